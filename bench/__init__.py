"""make bench: pg_ferret and others on one PostgreSQL, measured side by side."""
