/*
 * sql.c: one way for the launcher to run SQL, in which nothing that goes wrong
 * ends the launcher.
 */
#include "pg_ferret.h"

#include "access/xact.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

static char last_error[FERRET_PROBLEM_BYTES];

/* Why the last ferret_sql() failed, with its hint, on one line. */
char *
ferret_last_error(void)
{
	return last_error;
}

/* Keep an error's text; CONTEXT stays out, it can hold anything. */
static void
remember(const char *what, const ErrorData *error)
{
	const char *hint = error->hint;

	if (hint == NULL && strstr(error->message, "can only create extension in database") != NULL)
		hint = "ferretdb.database must equal cron.database_name.";
	else if (hint == NULL && (error->sqlerrcode == ERRCODE_UNDEFINED_FILE || error->sqlerrcode == ERRCODE_FEATURE_NOT_SUPPORTED))
		hint = "Install DocumentDB for this PostgreSQL version, and list pg_cron, pg_documentdb_core, pg_documentdb and pg_ferret "
			"in shared_preload_libraries, in this order.";
	snprintf(last_error, sizeof(last_error), "%s: %s%s%s", what, error->message, hint ? " HINT: " : "", hint ? hint : "");
}

/*
 * Run one statement in a transaction of its own, under 'search_path' if that is
 * given.  *result, if asked for, is the first column of its first row in the
 * caller's memory context, or NULL.  False if it failed: see ferret_last_error().
 */
bool
ferret_sql(const char *what, const char *sql, const char *search_path, char **result)
{
	MemoryContext caller = CurrentMemoryContext;
	volatile bool ok = false;

	if (result)
		*result = NULL;
	PG_TRY();
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		SPI_connect();
		PushActiveSnapshot(GetTransactionSnapshot());
		pgstat_report_activity(STATE_RUNNING, what);
		if (search_path)
			SPI_execute(psprintf("SET LOCAL search_path = %s", search_path), false, 0);
		if (SPI_execute(sql, false, 1) < 0)
			elog(ERROR, "SPI_execute failed");
		if (result && SPI_tuptable && SPI_processed > 0)
		{
			char	   *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);

			*result = value ? MemoryContextStrdup(caller, value) : NULL;
		}
		SPI_finish();
		PopActiveSnapshot();
		CommitTransactionCommand();
		ok = true;
	}
	PG_CATCH();
	{
		ErrorData  *error;

		HOLD_INTERRUPTS();
		MemoryContextSwitchTo(caller);
		error = CopyErrorData();
		FlushErrorState();
		AbortCurrentTransaction();
		remember(what, error);
		FreeErrorData(error);
		RESUME_INTERRUPTS();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(caller);
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
	return ok;
}
