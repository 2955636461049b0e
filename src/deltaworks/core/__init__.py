"""Forms, sites, anatomy, attaching and the registry: the engine, which knows no method."""
