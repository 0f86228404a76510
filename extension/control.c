/*
 * control.c: what a DBA asks of pg_ferret in SQL.
 */
#include "postgres.h"

#include "fmgr.h"
#include "storage/latch.h"
#include "storage/proc.h"

#include "pg_ferret.h"

PG_FUNCTION_INFO_V1(ferretdb_restart_workers);

/*
 * ferretdb.restart_workers(): have every worker replaced, its successor first.
 * Returns at once, as pg_reload_conf() does; ferretdb.status shows the progress.
 */
Datum
ferretdb_restart_workers(PG_FUNCTION_ARGS)
{
	ProcNumber	launcher = INVALID_PROC_NUMBER;
	bool		workers = false;

	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	for (int i = 1; i < SLOTS; i++)
		workers |= ferret_shared->slots[i].number[SLOT_KIND] != FERRET_KIND_FREE;
	if (ferret_shared->launcher && workers)
	{
		ferret_shared->rollings++;
		launcher = ferret_shared->launcher_proc;
	}
	LWLockRelease(ferret_shared->lock);
	if (launcher == INVALID_PROC_NUMBER)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_ferret has no workers to restart"),
				 errhint("See the view ferretdb.status and the server log.")));
	/* It may have ended since: whoever has its place then looks up once for nothing. */
	SetLatch(&GetPGProcByNumber(launcher)->procLatch);
	PG_RETURN_BOOL(true);
}
