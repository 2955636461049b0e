"""Many runs, their records, and the report that a person looks at."""
