"""DocumentDB's functions over libpq: bytes in, bytes out.  No wire format; the only package that imports psycopg."""
