"""Will it fit, how long does it take, which method: answers before any weight is loaded."""
