-- Created and updated by the launcher: nobody has to type CREATE EXTENSION.
-- It must not depend on documentdb: ferretdb.status has to tell why documentdb can't be created.
\echo Use "CREATE EXTENSION pg_ferret" to load this file. \quit

CREATE SCHEMA ferretdb;
GRANT USAGE ON SCHEMA ferretdb TO PUBLIC;

CREATE FUNCTION ferretdb.status(
    OUT kind text, OUT slot integer, OUT pid integer, OUT state text, OUT started timestamptz,
    OUT heartbeat_age interval, OUT generation bigint, OUT restarts bigint, OUT last_exit text,
    OUT connections bigint, OUT connections_total bigint, OUT requests bigint, OUT errors bigint,
    OUT in_flight bigint, OUT bytes_in bigint, OUT bytes_out bigint, OUT cursors bigint,
    OUT pool_size bigint, OUT pool_in_use bigint, OUT pool_waiting bigint, OUT rss bigint,
    OUT message text)
RETURNS SETOF record AS 'MODULE_PATHNAME', 'ferretdb_status' LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

CREATE VIEW ferretdb.status AS SELECT * FROM ferretdb.status() ORDER BY slot;
COMMENT ON VIEW ferretdb.status IS 'The processes of pg_ferret; slot 0 is the supervisor.';

REVOKE ALL ON FUNCTION ferretdb.status() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ferretdb.status() TO pg_monitor;
GRANT SELECT ON ferretdb.status TO pg_monitor;

CREATE FUNCTION ferretdb.settings_errors(OUT name text, OUT setting text, OUT error text)
RETURNS SETOF record AS 'MODULE_PATHNAME', 'ferretdb_settings_errors' LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

CREATE VIEW ferretdb.settings_errors AS SELECT * FROM ferretdb.settings_errors();
COMMENT ON VIEW ferretdb.settings_errors IS 'Settings that are not in force as they were written, and why.';

CREATE FUNCTION ferretdb.restart_workers() RETURNS boolean
AS 'MODULE_PATHNAME', 'ferretdb_restart_workers' LANGUAGE C STRICT VOLATILE;
COMMENT ON FUNCTION ferretdb.restart_workers() IS 'Replaces every worker, one after the other, without a failed request.';

REVOKE ALL ON FUNCTION ferretdb.settings_errors(), ferretdb.restart_workers() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ferretdb.settings_errors() TO pg_monitor;
GRANT SELECT ON ferretdb.settings_errors TO pg_monitor;

-- What clients send goes to the engine through these: they return their argument or raise an error.
CREATE FUNCTION ferretdb.checked_bson(bytea) RETURNS bytea
AS 'MODULE_PATHNAME', 'ferretdb_checked_bson' LANGUAGE C STRICT IMMUTABLE PARALLEL SAFE;
CREATE FUNCTION ferretdb.checked_bsonsequence(bytea) RETURNS bytea
AS 'MODULE_PATHNAME', 'ferretdb_checked_bsonsequence' LANGUAGE C STRICT IMMUTABLE PARALLEL SAFE;

-- The same for a find, which may be continued in another way: see streaming.c.
CREATE FUNCTION ferretdb.checked_find(bytea) RETURNS bytea
AS 'MODULE_PATHNAME', 'ferretdb_checked_find' LANGUAGE C STRICT VOLATILE;

-- A write that the gateway flushes together with others: see commit.c.
CREATE FUNCTION ferretdb.commit_unflushed(wanted boolean) RETURNS bigint
AS 'MODULE_PATHNAME', 'ferretdb_commit_unflushed' LANGUAGE C STRICT VOLATILE;
CREATE FUNCTION ferretdb.flush_commits(incarnation bigint) RETURNS void
AS 'MODULE_PATHNAME', 'ferretdb_flush_commits' LANGUAGE C STRICT VOLATILE;
REVOKE ALL ON FUNCTION ferretdb.commit_unflushed(boolean), ferretdb.flush_commits(bigint) FROM PUBLIC;
