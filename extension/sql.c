/*
 * sql.c: how the launcher runs SQL.
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "tcop/tcopprot.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "pg_ferret.h"

/*
 * Run SQL in a transaction of its own; false and a log line if that fails, which
 * never ends the launcher.  The first column of the first row goes to *value.
 */
bool
run_sql(const char *sql, char **value, ErrorData **error)
{
	MemoryContext caller = CurrentMemoryContext;
	volatile bool done = false;

	/* lock_timeout acts by SIGINT; outside SQL, pg_cancel_backend() must not end us. */
	pqsignal(SIGINT, StatementCancelHandler);
	PG_TRY();
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		SPI_connect();
		PushActiveSnapshot(GetTransactionSnapshot());
		pgstat_report_activity(STATE_RUNNING, sql);
		if (SPI_execute(sql, false, 0) < 0)
			elog(ERROR, "SPI_execute failed");
		if (value)
		{
			char	   *text = SPI_processed ? SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1) : NULL;

			*value = text ? MemoryContextStrdup(caller, text) : NULL;
		}
		SPI_finish();
		PopActiveSnapshot();
		CommitTransactionCommand();
		done = true;
	}
	PG_CATCH();
	{
		HOLD_INTERRUPTS();
		MemoryContextSwitchTo(caller);
		*error = CopyErrorData();
		FlushErrorState();
		AbortCurrentTransaction();
		RESUME_INTERRUPTS();
	}
	PG_END_TRY();
	pqsignal(SIGINT, SIG_IGN);
	QueryCancelPending = false;
	MemoryContextSwitchTo(caller);
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
	return done;
}
