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
#include "replication/walsender.h"
#include "replication/walsender_private.h"
#include "storage/lwlock.h"
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

/* Have the standbys confirmed it that synchronous_commit demands? */
static bool
is_replicated(XLogRecPtr end)
{
	int			mode = SYNC_REP_WAIT_FLUSH;
	bool		needless = SyncRepStandbyNames == NULL || SyncRepStandbyNames[0] == 0;
	bool		confirmed;

	if (!SyncRepRequested())
		return true;
	if (synchronous_commit == SYNCHRONOUS_COMMIT_REMOTE_WRITE)
		mode = SYNC_REP_WAIT_WRITE;
	else if (synchronous_commit == SYNCHRONOUS_COMMIT_REMOTE_APPLY)
		mode = SYNC_REP_WAIT_APPLY;
	LWLockAcquire(SyncRepLock, LW_SHARED);
#ifdef SYNC_STANDBY_INIT		/* 18, and later minor releases of 17 */
	if (WalSndCtl->sync_standbys_status & SYNC_STANDBY_INIT)
		needless = (WalSndCtl->sync_standbys_status & SYNC_STANDBY_DEFINED) == 0;
#else
	needless = !WalSndCtl->sync_standbys_defined;
#endif
	confirmed = WalSndCtl->lsn[mode] >= end;
	LWLockRelease(SyncRepLock);
	return needless || confirmed;
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
	/* A cancel request ends this wait with a warning only; who has asked must not take that for confirmed. */
	HOLD_INTERRUPTS();
	SyncRepWaitForLSN(end, true);
	RESUME_INTERRUPTS();
	if (!is_replicated(end))
		ereport(ERROR,
				(errcode(ERRCODE_QUERY_CANCELED), errmsg("canceled before a standby has confirmed the writes")));
	PG_RETURN_VOID();
}
