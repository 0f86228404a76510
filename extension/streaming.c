/*
 * streaming.c: finds that read a collection in the order of _id.
 *
 * DocumentDB has two ways to go on with a cursor whose result is kept nowhere.
 * The newer one (documentdb.enableDynamicCursors), which is off by default,
 * takes a quarter less of the CPU for a page.  Where it goes on behind an _id
 * it is exact: what is written meanwhile makes it neither miss nor repeat any
 * other document.  In the order of another index either way can repeat what is
 * updated meanwhile, and this one can miss it.  So it is switched on for finds
 * that are without a condition, or have one on _id alone, and for no other.
 * What is read may be a view, or have an index that the engine prefers even so:
 * the continuation says, and the gateway then makes the find again
 * (reads_by_id() in pg_ferret/engine/calls.py).
 */
#include "postgres.h"

#include "access/xact.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/proc.h"
#include "utils/guc.h"
#include "varatt.h"

#include "bson.h"

#define DYNAMIC_CURSORS "documentdb.enableDynamicCursors"

PG_FUNCTION_INFO_V1(ferretdb_checked_find);

/* Fields of a find that change nothing about the order in which it reads. */
static const char *const harmless[] = {
	"find", "projection", "lsid", "$db", "comment", "maxTimeMS", "noCursorTimeout", "readConcern",
	"$readPreference", "$clusterTime", "apiVersion", "apiStrict", "apiDeprecationErrors"
};

static bool
is_harmless(const char *name)
{
	for (int i = 0; i < (int) lengthof(harmless); i++)
		if (strcmp(name, harmless[i]) == 0)
			return true;
	return false;
}

/* Is there no condition, or only one, of operators for _id? */
static bool
only_id(const unsigned char *filter)
{
	const unsigned char *end = filter + read_int32(filter) - 1;
	const unsigned char *first = filter + 4;
	const unsigned char *condition;

	if (first == end)
		return true;
	if (first[0] != BSON_DOCUMENT || strcmp((const char *) first + 1, "_id") != 0)
		return false;
	condition = first + 1 + sizeof("_id");
	return condition[4] != 0 && condition[5] == '$' && condition + read_int32(condition) == end;
}

/* A page without documents leaves it to the next one how to go on.  The engine reads 32 bits of any integer. */
static bool
asks_for_documents(unsigned char type, const unsigned char *at)
{
	return (type == BSON_INT32 || type == BSON_INT64) && read_int32(at) != 0;
}

/* Does this find, a document that has been checked, read in the order of _id, as far as it says itself? */
static bool
reads_by_id(const unsigned char *at)
{
	const unsigned char *end = at + read_int32(at) - 1;

	at += 4;
	while (at < end)
	{
		unsigned char type = *at++;
		const char *name = (const char *) at;

		at += strlen(name) + 1;
		if (strcmp(name, "filter") == 0)
		{
			if (type != BSON_DOCUMENT || !only_id(at))
				return false;
		}
		else if (strcmp(name, "batchSize") == 0)
		{
			if (!asks_for_documents(type, at))
				return false;
		}
		else if (!is_harmless(name))
			return false;
		at = skip_value(type, at, end);
	}
	return true;
}

/* Until the end of the transaction, or the next find in it.  What the DBA has switched on stays so. */
static void
set_dynamic_cursors(bool wanted)
{
	static LocalTransactionId ours = InvalidLocalTransactionId; /* where it is on because of us */
	LocalTransactionId here = MyProc->vxid.lxid;
	const char *value;

	if (wanted == (ours == here))
		return;
	/* Releases of DocumentDB come and go that do not have it. */
	value = GetConfigOption(DYNAMIC_CURSORS, true, false);
	if (value == NULL || (wanted && strcmp(value, "on") == 0))
		return;
	(void) set_config_option(DYNAMIC_CURSORS, wanted ? "on" : "off", superuser() ? PGC_SUSET : PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	ours = wanted ? here : InvalidLocalTransactionId;
}

/*
 * ferretdb.checked_find(bytea): as ferretdb.checked_bson(), for a find.  In a
 * transaction block the engine keeps a cursor's result, and is left to do so.
 */
Datum
ferretdb_checked_find(PG_FUNCTION_ARGS)
{
	Datum		find = ferretdb_checked_bson(fcinfo);

	set_dynamic_cursors(!IsTransactionBlock() && reads_by_id((const unsigned char *) VARDATA_ANY(DatumGetPointer(find))));
	return find;
}
