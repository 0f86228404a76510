/*
 * status.c: the status table in shared memory and the function behind the view
 * ferretdb.status.
 */
#include "pg_ferret.h"

#include <time.h>

#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(ferretdb_status);

#define STATUS_COLUMNS 22
#define UNIX_EPOCH_USECS ((POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY)

/* How much shared memory the table takes. */
Size
ferret_shared_size(void)
{
	return add_size(offsetof(FerretShared, slots), mul_size(ferret_max_workers + 1, sizeof(FerretSlot)));
}

/* Attach to the table; the first to come zeroes it. */
void
ferret_shared_init(void)
{
	bool		found;

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	ferret_shared = ShmemInitStruct("pg_ferret", ferret_shared_size(), &found);
	if (!found)
	{
		memset(ferret_shared, 0, ferret_shared_size());
		ferret_shared->lock = &GetNamedLWLockTranche("pg_ferret")->lock;
	}
	LWLockRelease(AddinShmemInitLock);
}

/* Publish a slot that the supervisor sent. */
void
ferret_store_slot(int index, const FerretSlot *slot)
{
	if (index < 0 || index > ferret_max_workers)
		return;
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	memcpy(&ferret_shared->slots[index], slot, sizeof(FerretSlot));
	LWLockRelease(ferret_shared->lock);
}

/* No process below the launcher is left. */
void
ferret_clear_slots(void)
{
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	memset(&ferret_shared->slots[1], 0, mul_size(ferret_max_workers, sizeof(FerretSlot)));
	LWLockRelease(ferret_shared->lock);
}

/* The supervisor's row as long as there is no supervisor to fill it; NULL leaves a text as it is. */
void
ferret_supervisor_state(int64 pid, int64 state, const char *last_exit, const char *message)
{
	FerretSlot *slot = &ferret_shared->slots[0];

	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	slot->number[SLOT_KIND] = FERRET_KIND_SUPERVISOR;
	slot->number[SLOT_SLOT] = 0;
	slot->number[SLOT_PID] = pid;
	slot->number[SLOT_STATE] = state;
	for (int number = SLOT_CONNECTIONS; number < SLOT_NUMBERS; number++)
		slot->number[number] = SLOT_NULL;
	if (pid == 0)
		slot->number[SLOT_STARTED] = slot->number[SLOT_HEARTBEAT] = 0;
	if (last_exit)
		strlcpy(slot->last_exit, last_exit, sizeof(slot->last_exit));
	if (message)
		strlcpy(slot->message, message, sizeof(slot->message));
	LWLockRelease(ferret_shared->lock);
}

/* What the launcher itself has to complain about; the empty string takes it back. */
void
ferret_problem(const char *text)
{
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	strlcpy(ferret_shared->problem, text, sizeof(ferret_shared->problem));
	LWLockRelease(ferret_shared->lock);
}

/* -1 stands for "does not apply". */
static void
put_number(int64 value, Datum *datum, bool *null)
{
	*null = value < 0;
	*datum = Int64GetDatum(value);
}

/* The name that a number stands for. */
static void
put_name(const char *const names[], int count, int64 number, Datum *datum, bool *null)
{
	*null = number < 0 || number >= count || names[number] == NULL;
	if (!*null)
		*datum = CStringGetTextDatum(names[number]);
}

/* The texts come from another process: never trust them to be UTF-8 or terminated. */
static void
put_text(const char *bytes, int size, Datum *datum, bool *null)
{
	int			length = strnlen(bytes, size);

	*null = length == 0 || !pg_verify_mbstr(PG_UTF8, bytes, length, true);
	if (!*null)
		*datum = PointerGetDatum(cstring_to_text_with_len(bytes, length));
}

/* The time since the slot's process last said that it lives. */
static void
put_heartbeat_age(const FerretSlot *slot, Datum *datum, bool *null)
{
	struct timespec now;
	Interval   *age = palloc0(sizeof(Interval));

	clock_gettime(CLOCK_MONOTONIC, &now);
	*null = slot->number[SLOT_HEARTBEAT] <= 0;
	age->time = Max(0, (now.tv_sec * INT64CONST(1000000000) + now.tv_nsec - slot->number[SLOT_HEARTBEAT]) / 1000);
	*datum = IntervalPGetDatum(age);
}

/* One row of the view. */
static void
put_slot(const FerretSlot *slot, ReturnSetInfo *set)
{
	static const char *const kinds[] = FERRET_KIND_NAMES;
	static const char *const states[] = FERRET_STATE_NAMES;
	Datum		values[STATUS_COLUMNS] = {0};
	bool		nulls[STATUS_COLUMNS] = {0};
	int			column = 0;

	put_name(kinds, lengthof(kinds), slot->number[SLOT_KIND], &values[column], &nulls[column]);
	column++;
	values[column++] = Int32GetDatum((int32) slot->number[SLOT_SLOT]);
	nulls[column] = slot->number[SLOT_PID] <= 0;
	values[column++] = Int32GetDatum((int32) slot->number[SLOT_PID]);
	put_name(states, lengthof(states), slot->number[SLOT_STATE], &values[column], &nulls[column]);
	column++;
	nulls[column] = slot->number[SLOT_STARTED] <= 0;
	values[column++] = TimestampTzGetDatum(slot->number[SLOT_STARTED] - UNIX_EPOCH_USECS);
	put_heartbeat_age(slot, &values[column], &nulls[column]);
	column++;
	for (int number = SLOT_GENERATION; number < SLOT_NUMBERS; number++)
	{
		put_number(slot->number[number], &values[column], &nulls[column]);
		column++;
		if (number == SLOT_RESTARTS)
		{
			put_text(slot->last_exit, sizeof(slot->last_exit), &values[column], &nulls[column]);
			column++;
		}
	}
	put_text(slot->message, sizeof(slot->message), &values[column], &nulls[column]);
	Assert(column == STATUS_COLUMNS - 1);
	tuplestore_putvalues(set->setResult, set->setDesc, values, nulls);
}

/* The supervisor's row: its message tells the launcher's problems too. */
static void
put_supervisor(const FerretSlot *shared, const char *problem, int launcher_pid, ReturnSetInfo *set)
{
	FerretSlot	slot = *shared;
	char		message[sizeof(slot.message)];

	slot.number[SLOT_KIND] = FERRET_KIND_SUPERVISOR;
	if (launcher_pid == 0)
	{
		slot.number[SLOT_PID] = slot.number[SLOT_STARTED] = slot.number[SLOT_HEARTBEAT] = 0;
		slot.number[SLOT_STATE] = FERRET_STATE_FAILED;
		strlcpy(slot.message, "launcher not running, see max_worker_processes and PostgreSQL's log", sizeof(slot.message));
	}
	if (problem[0] != '\0')
	{
		/* The problem first: it is what the reader must not miss. */
		snprintf(message, sizeof(message), "%s%s%.*s", problem, slot.message[0] ? "; " : "",
				 (int) strnlen(slot.message, sizeof(slot.message)), slot.message);
		message[pg_mbcliplen(message, strlen(message), sizeof(message) - 1)] = '\0';
		memcpy(slot.message, message, sizeof(message));
	}
	put_slot(&slot, set);
}

/* ferretdb.status(): a consistent copy of the table, as rows. */
Datum
ferretdb_status(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *set = (ReturnSetInfo *) fcinfo->resultinfo;
	Size		size = ferret_shared_size();
	FerretShared *copy = palloc(size);

	InitMaterializedSRF(fcinfo, 0);
	LWLockAcquire(ferret_shared->lock, LW_SHARED);
	memcpy(copy, ferret_shared, size);
	LWLockRelease(ferret_shared->lock);

	put_supervisor(&copy->slots[0], copy->problem, copy->launcher_pid, set);
	for (int index = 1; index <= ferret_max_workers; index++)
		if (copy->slots[index].number[SLOT_KIND] != FERRET_KIND_FREE)
			put_slot(&copy->slots[index], set);
	pfree(copy);
	PG_RETURN_NULL();
}
