/* pg_ferret--1.0.sql: run by the launcher (launcher.c), not by people. */
\echo Use "CREATE EXTENSION pg_ferret" to load this file. \quit

CREATE SCHEMA ferretdb;
GRANT USAGE ON SCHEMA ferretdb TO PUBLIC;

CREATE FUNCTION ferretdb.status(
    OUT kind text, OUT slot integer, OUT pid integer, OUT state text, OUT started timestamptz,
    OUT heartbeat_age interval, OUT generation bigint, OUT restarts bigint, OUT last_exit text,
    OUT connections bigint, OUT connections_total bigint, OUT requests bigint, OUT errors bigint,
    OUT in_flight bigint, OUT bytes_in bigint, OUT bytes_out bigint, OUT cursors bigint,
    OUT pool_size bigint, OUT pool_in_use bigint, OUT pool_waiting bigint, OUT rss bigint, OUT message text)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'ferretdb_status'
LANGUAGE C STRICT VOLATILE PARALLEL SAFE;

CREATE VIEW ferretdb.status AS SELECT * FROM ferretdb.status() ORDER BY slot;

REVOKE ALL ON FUNCTION ferretdb.status() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ferretdb.status() TO pg_monitor;
GRANT SELECT ON ferretdb.status TO pg_monitor;

/* What a write brings is passed through these (bson_check.c). */
CREATE FUNCTION ferretdb.checked_bson(bytea) RETURNS bytea
AS 'MODULE_PATHNAME', 'ferretdb_checked_bson'
LANGUAGE C STRICT IMMUTABLE PARALLEL SAFE;

CREATE FUNCTION ferretdb.checked_bsonsequence(bytea) RETURNS bytea
AS 'MODULE_PATHNAME', 'ferretdb_checked_bsonsequence'
LANGUAGE C STRICT IMMUTABLE PARALLEL SAFE;
