/*
 * status.c: the status table in shared memory.  The launcher writes it; the
 * functions behind the views ferretdb.status and ferretdb.settings_errors read
 * it, and nothing else, so they work on a standby and without a single process
 * of ours.
 */
#include "postgres.h"

#include <time.h>

#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "pg_ferret.h"

/* Microseconds from the epoch of time stamps in slots to PostgreSQL's. */
#define UNIX_TO_POSTGRES ((POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY)

PG_FUNCTION_INFO_V1(ferretdb_status);
PG_FUNCTION_INFO_V1(ferretdb_settings_errors);

/* The columns, in the order of pg_ferret--1.0.sql. */
enum
{
	COLUMN_KIND,
	COLUMN_SLOT,
	COLUMN_PID,
	COLUMN_STATE,
	COLUMN_STARTED,
	COLUMN_HEARTBEAT_AGE,
	COLUMN_GENERATION,
	COLUMN_RESTARTS,
	COLUMN_LAST_EXIT,
	COLUMN_COUNTERS,			/* SLOT_CONNECTIONS and all that follow */
	COLUMN_MESSAGE = COLUMN_COUNTERS + SLOT_NUMBERS - SLOT_CONNECTIONS,
	COLUMNS
};

/* Nanoseconds of the clock that heartbeats are measured with. */
int64
monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64) now.tv_sec * 1000000000 + now.tv_nsec;
}

/*
 * A palloc'd copy of UTF-8 text from another process, up to its first NUL:
 * what is not valid in this database loses its non-ASCII bytes.
 */
char *
clean_text(const char *data, size_t size)
{
	char	   *text = pnstrdup(data, size);

	if (GetDatabaseEncoding() != PG_UTF8 || !pg_verify_mbstr(PG_UTF8, text, strlen(text), true))
		for (char *at = text; *at; at++)
			if (IS_HIGHBIT_SET(*at))
				*at = '?';
	return text;
}

/*
 * Log what is wrong, once, and show it in slot 0 until it is something else;
 * no text means that all is well again.
 */
void
set_trouble(int subject, const char *text, const char *hint)
{
	char	   *shown = ferret_shared->trouble[subject];	/* nobody else writes it */
	char		line[sizeof(ferret_shared->trouble[0])] = "";

	if (text)
		snprintf(line, sizeof(line), "%s%s%s%s", text, hint ? " (" : "", hint ? hint : "", hint ? ")" : "");
	if (strcmp(shown, line) == 0)
		return;
	if (text)
		ereport(LOG, errmsg("pg_ferret: %s", text), hint ? errhint("%s", hint) : 0);
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	strcpy(shown, line);
	LWLockRelease(ferret_shared->lock);
}

/* Fill slot 0 on behalf of a supervisor that cannot do so itself, or not yet; NULL keeps the message. */
void
show_supervisor(pid_t supervisor, int state, const char *message)
{
	FerretSlot *slot = &ferret_shared->slots[0];

	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SLOT_NUMBERS; i++)
		slot->number[i] = SLOT_NULL;
	slot->number[SLOT_KIND] = FERRET_KIND_SUPERVISOR;
	slot->number[SLOT_STATE] = state;
	slot->number[SLOT_PID] = supervisor;
	if (supervisor)
	{
		slot->number[SLOT_STARTED] = GetCurrentTimestamp() + UNIX_TO_POSTGRES;
		slot->number[SLOT_HEARTBEAT] = monotonic_ns();
	}
	slot->number[SLOT_GENERATION] = ferret_shared->generation;
	slot->number[SLOT_RESTARTS] = ferret_shared->restarts;
	strlcpy(slot->last_exit, ferret_shared->last_exit, sizeof(slot->last_exit));
	if (message)
		strlcpy(slot->message, message, sizeof(slot->message));
	LWLockRelease(ferret_shared->lock);
}

/* A status slot: int32 index, little-endian, and the slot. */
void
take_slot(const unsigned char *body, size_t size)
{
	uint32		index;
	FerretSlot	slot;

	if (size != 4 + sizeof(FerretSlot))
		return;
	index = body[0] | body[1] << 8 | body[2] << 16 | (uint32) body[3] << 24;
	if (index >= (uint32) SLOTS)
		return;
	memcpy(&slot, body + 4, sizeof(slot));
	slot.last_exit[sizeof(slot.last_exit) - 1] = '\0';
	slot.message[sizeof(slot.message) - 1] = '\0';
	if (index == 0)
	{
		/* Of its predecessors a supervisor knows nothing. */
		slot.number[SLOT_GENERATION] = ferret_shared->generation;
		slot.number[SLOT_RESTARTS] = ferret_shared->restarts;
		strlcpy(slot.last_exit, ferret_shared->last_exit, sizeof(slot.last_exit));
	}
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	ferret_shared->slots[index] = slot;
	LWLockRelease(ferret_shared->lock);
}

/* What is wrong with the settings at present, as the supervisor packs it. */
void
take_setting_errors(const char *body, size_t size)
{
	if (size > sizeof(ferret_shared->setting_errors) || (size > 0 && body[size - 1] != '\0'))
		return;
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	memcpy(ferret_shared->setting_errors, body, size);
	ferret_shared->setting_errors_size = size;
	LWLockRelease(ferret_shared->lock);
}

/* One setting is wrong, found by the launcher itself: without a supervisor there is nobody else to tell. */
void
set_setting_error(const char *name, const char *value, const char *error)
{
	StringInfoData text;

	initStringInfo(&text);
	appendBinaryStringInfo(&text, name, strlen(name) + 1);
	appendBinaryStringInfo(&text, value, strlen(value) + 1);
	appendBinaryStringInfo(&text, error, strlen(error) + 1);
	take_setting_errors(text.data, text.len);
}

/* A column that holds text; empty text is NULL. */
static void
set_text(Datum *values, bool *nulls, int column, const char *text)
{
	nulls[column] = text == NULL || *text == '\0';
	if (!nulls[column])
		values[column] = CStringGetTextDatum(text);
}

/* A column that holds a number of a slot; the number 'null' is NULL. */
static void
set_number(Datum *values, bool *nulls, int column, int64 number, int64 null)
{
	nulls[column] = number == null;
	values[column] = Int64GetDatum(number);
}

/* The name of a kind or state, NULL if there is none. */
static const char *
name_of(const char *const *names, int count, int64 number)
{
	return number >= 0 && number < count ? names[number] : NULL;
}

/* One row from one slot; 'trouble' is what the launcher has to say. */
static void
put_row(ReturnSetInfo *result, const FerretSlot *slot, int index, const char *trouble)
{
	static const char *const kinds[] = FERRET_KIND_NAMES;
	static const char *const states[] = FERRET_STATE_NAMES;
	const int64 *number = slot->number;
	Datum		values[COLUMNS] = {0};
	bool		nulls[COLUMNS] = {0};
	char	   *message = clean_text(slot->message, sizeof(slot->message));
	Interval	age = {0};

	age.time = Max(0, monotonic_ns() - number[SLOT_HEARTBEAT]) / 1000;
	if (*trouble)
		message = psprintf("%s%s%s", message, *message ? "; " : "", trouble);

	set_text(values, nulls, COLUMN_KIND, name_of(kinds, lengthof(kinds), number[SLOT_KIND]));
	values[COLUMN_SLOT] = Int32GetDatum(index);
	values[COLUMN_PID] = Int32GetDatum((int32) number[SLOT_PID]);
	nulls[COLUMN_PID] = number[SLOT_PID] <= 0;
	set_text(values, nulls, COLUMN_STATE, name_of(states, lengthof(states), number[SLOT_STATE]));
	values[COLUMN_STARTED] = TimestampTzGetDatum(number[SLOT_STARTED] - UNIX_TO_POSTGRES);
	nulls[COLUMN_STARTED] = number[SLOT_STARTED] <= 0;
	values[COLUMN_HEARTBEAT_AGE] = IntervalPGetDatum(&age);
	nulls[COLUMN_HEARTBEAT_AGE] = number[SLOT_HEARTBEAT] <= 0;
	set_number(values, nulls, COLUMN_GENERATION, number[SLOT_GENERATION], SLOT_NULL);
	set_number(values, nulls, COLUMN_RESTARTS, number[SLOT_RESTARTS], SLOT_NULL);
	set_text(values, nulls, COLUMN_LAST_EXIT, clean_text(slot->last_exit, sizeof(slot->last_exit)));
	for (int i = SLOT_CONNECTIONS; i < SLOT_NUMBERS; i++)
		set_number(values, nulls, COLUMN_COUNTERS + i - SLOT_CONNECTIONS, number[i], SLOT_NULL);
	set_text(values, nulls, COLUMN_MESSAGE, message);
	tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
}

/* ferretdb.status(): one row for the supervisor and one for each worker. */
Datum
ferretdb_status(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	int			count = SLOTS;
	FerretSlot *slots = palloc_array(FerretSlot, count);
	char		trouble[TROUBLES][sizeof(ferret_shared->trouble[0])];
	StringInfoData text;
	bool		launcher;

	InitMaterializedSRF(fcinfo, 0);

	LWLockAcquire(ferret_shared->lock, LW_SHARED);
	memcpy(slots, ferret_shared->slots, count * sizeof(FerretSlot));
	memcpy(trouble, ferret_shared->trouble, sizeof(trouble));
	launcher = ferret_shared->launcher != 0;
	LWLockRelease(ferret_shared->lock);

	initStringInfo(&text);
	if (!launcher)
	{
		memset(&slots[0], 0, sizeof(FerretSlot));
		for (int i = SLOT_HEARTBEAT; i < SLOT_NUMBERS; i++)
			slots[0].number[i] = SLOT_NULL;
		slots[0].number[SLOT_KIND] = FERRET_KIND_SUPERVISOR;
		slots[0].number[SLOT_STATE] = FERRET_STATE_FAILED;
		appendStringInfoString(&text, "launcher not running, see max_worker_processes and the server log");
	}
	for (int i = 0; i < TROUBLES; i++)
		if (trouble[i][0])
			appendStringInfo(&text, "%s%s", text.len ? "; " : "", clean_text(trouble[i], sizeof(trouble[i])));

	put_row(result, &slots[0], 0, text.data);
	for (int i = 1; i < count; i++)
		if (slots[i].number[SLOT_KIND] != FERRET_KIND_FREE)
			put_row(result, &slots[i], i, "");
	return (Datum) 0;
}

/* ferretdb.settings_errors(): one row for each setting that is not in force as it was written. */
Datum
ferretdb_settings_errors(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	char		data[sizeof(ferret_shared->setting_errors)];
	size_t		size;
	Datum		values[3];
	bool		nulls[3];

	InitMaterializedSRF(fcinfo, 0);
	LWLockAcquire(ferret_shared->lock, LW_SHARED);
	size = ferret_shared->setting_errors_size;
	memcpy(data, ferret_shared->setting_errors, size);
	LWLockRelease(ferret_shared->lock);

	for (const char *at = data, *end = data + size; at < end;)
	{
		for (int column = 0; column < 3; column++)
		{
			set_text(values, nulls, column, at < end ? clean_text(at, strlen(at)) : NULL);
			at += at < end ? strlen(at) + 1 : 0;
		}
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
