/*
 * commit.c: writes whose commit is flushed by the gateway, for many at once.
 *
 * A backend that commits waits for the disk, and its connection with it.  The
 * gateway needs neither: it commits without a flush, serves the next request
 * on the same connection, and tells its client only when a later flush, one
 * for all that have been committed meanwhile, has made the write as durable
 * as synchronous_commit demands.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "replication/syncrep.h"
#include "utils/guc.h"

#include "pg_ferret.h"

PG_FUNCTION_INFO_V1(ferretdb_commit_unflushed);
PG_FUNCTION_INFO_V1(ferretdb_flush_commits);

/*
 * ferretdb.commit_unflushed(wanted): the transaction at hand commits without
 * waiting, if that is wanted.  The caller has to call ferretdb.flush_commits()
 * with the value returned before it tells anybody; with NULL there is nothing
 * to wait for.
 */
Datum
ferretdb_commit_unflushed(PG_FUNCTION_ARGS)
{
	if (!PG_GETARG_BOOL(0) || synchronous_commit == SYNCHRONOUS_COMMIT_OFF)
		PG_RETURN_NULL();
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	PG_RETURN_INT64(ferret_shared->incarnation);
}

/*
 * Behind the last record in the WAL, where a new one would not always begin:
 * pages have headers.  Not every minor release has GetXLogInsertEndRecPtr().
 */
static XLogRecPtr
end_of_wal(void)
{
	XLogRecPtr	next = GetXLogInsertRecPtr();

	if (XLogSegmentOffset(next, wal_segment_size) == SizeOfXLogLongPHD)
		return next - SizeOfXLogLongPHD;
	if (next % XLOG_BLCKSZ == SizeOfXLogShortPHD)
		return next - SizeOfXLogShortPHD;
	return next;
}

/*
 * ferretdb.flush_commits(incarnation): wait until all that is committed by now
 * is as durable as synchronous_commit demands of this session.  A server that
 * has been restarted since cannot confirm what it may have lost.
 */
Datum
ferretdb_flush_commits(PG_FUNCTION_ARGS)
{
	XLogRecPtr	end;

	if (PG_GETARG_INT64(0) != ferret_shared->incarnation)
		ereport(ERROR,
				(errcode(ERRCODE_CRASH_SHUTDOWN),
				 errmsg("PostgreSQL was restarted before the write was flushed")));
	end = end_of_wal();
	XLogFlush(end);
	/* As a commit does: a cancel request may end the wait for a standby, but with a warning, not with an error. */
	HOLD_INTERRUPTS();
	SyncRepWaitForLSN(end, true);
	RESUME_INTERRUPTS();
	PG_RETURN_VOID();
}
