/*
 * bson_check.c: refuse malformed BSON before the engine sees it.
 *
 * DocumentDB looks at a document's outer length only: what is broken inside is
 * stored, and every client that reads it back fails; in a query it can take the
 * whole server down, as can text that is not UTF-8, which the engine repeats in
 * its messages.  So the gateway wraps whatever comes from clients in these
 * functions.  They check structure and UTF-8 (https://bsonspec.org/spec.html).
 */
#include "postgres.h"

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "varatt.h"

#include "bson.h"

/* MongoDB's limit for the nesting of documents. */
#define MAX_DEPTH 200
/* What a backend's heap keeps of its memory. */
#define KEPT_BYTES (1024 * 1024)

PG_FUNCTION_INFO_V1(ferretdb_checked_bson);
PG_FUNCTION_INFO_V1(ferretdb_checked_bsonsequence);

/* Are these bytes UTF-8?  NULs among them are. */
static bool
is_utf8(const unsigned char *at, int length)
{
	const unsigned char *end = at + length;

	while (at < end)
	{
		/* Only up to the next NUL: PostgreSQL's function reads all it is given, each time. */
		const unsigned char *nul = memchr(at, 0, end - at);
		int			part = (nul ? nul : end) - at;

		if (pg_encoding_verifymbstr(PG_UTF8, (const char *) at, part) != part)
			return false;
		at += part + 1;
	}
	return true;
}

/* Behind a NUL-terminated string, or NULL if it does not end before 'end'. */
static const unsigned char *
skip_cstring(const unsigned char *at, const unsigned char *end)
{
	const unsigned char *nul = at < end ? memchr(at, 0, end - at) : NULL;

	return nul && is_utf8(at, nul - at) ? nul + 1 : NULL;
}

/* Behind a length-prefixed string, or NULL if it is malformed. */
static const unsigned char *
skip_string(const unsigned char *at, const unsigned char *end)
{
	int32		length;

	if (end - at < 5)
		return NULL;
	length = read_int32(at);
	if (length < 1 || length > end - at - 4 || at[4 + length - 1] != 0 || !is_utf8(at + 4, length - 1))
		return NULL;
	return at + 4 + length;
}

/* The end of the document at 'at' by its own length, or NULL if that cannot be. */
static const unsigned char *
document_end(const unsigned char *at, const unsigned char *end)
{
	int32		length;

	if (end - at < 5)
		return NULL;
	length = read_int32(at);
	if (length < 5 || length > end - at || at[length - 1] != 0)
		return NULL;
	return at + length;
}

/* Behind a value that is no document, or NULL if it is malformed or of an unknown type. */
static const unsigned char *
skip_scalar(unsigned char type, const unsigned char *at, const unsigned char *end)
{
	int32		length;

	switch (type)
	{
		case 0x06:				/* undefined */
		case 0x0A:				/* null */
		case 0xFF:				/* minKey */
		case 0x7F:				/* maxKey */
			return at;
		case 0x08:				/* bool */
			return end - at >= 1 && at[0] <= 1 ? at + 1 : NULL;
		case BSON_INT32:
			return end - at >= 4 ? at + 4 : NULL;
		case 0x01:				/* double */
		case 0x09:				/* datetime */
		case 0x11:				/* timestamp */
		case BSON_INT64:
			return end - at >= 8 ? at + 8 : NULL;
		case 0x07:				/* ObjectId */
			return end - at >= 12 ? at + 12 : NULL;
		case 0x13:				/* decimal128 */
			return end - at >= 16 ? at + 16 : NULL;
		case 0x02:				/* string */
		case 0x0D:				/* code */
		case 0x0E:				/* symbol */
			return skip_string(at, end);
		case 0x0B:				/* regular expression: pattern, options */
			at = skip_cstring(at, end);
			return at ? skip_cstring(at, end) : NULL;
		case 0x0C:				/* DBPointer: name, ObjectId */
			at = skip_string(at, end);
			return at && end - at >= 12 ? at + 12 : NULL;
		case 0x05:				/* binary: length, subtype, bytes */
			if (end - at < 5)
				return NULL;
			length = read_int32(at);
			if (length < 0 || length > end - at - 5)
				return NULL;
			/* The old subtype has a length of its own in front. */
			if (at[4] == 2 && (length < 4 || read_int32(at + 5) != length - 4))
				return NULL;
			return at + 5 + length;
		default:
			return NULL;
	}
}

/* Behind a value in a document that has been checked. */
const unsigned char *
skip_value(unsigned char type, const unsigned char *at, const unsigned char *end)
{
	if (type == BSON_DOCUMENT || type == BSON_ARRAY || type == BSON_CODE_WITH_SCOPE)
		return at + read_int32(at);
	return skip_scalar(type, at, end);
}

/* Behind the document at 'at', or NULL if anything in it is malformed. */
static const unsigned char *
check_document(const unsigned char *at, const unsigned char *limit)
{
	const unsigned char *ends[MAX_DEPTH];	/* the ends of the documents we are in */
	int			depth = 0;

	if ((ends[0] = document_end(at, limit)) == NULL)
		return NULL;
	at += 4;
	for (;;)
	{
		const unsigned char *end = ends[depth] - 1; /* its closing NUL */
		unsigned char type;

		if (at == end)
		{
			at++;
			if (depth-- == 0)
				return at;
			continue;
		}
		type = *at++;
		if ((at = skip_cstring(at, end)) == NULL)
			return NULL;
		if (type == BSON_CODE_WITH_SCOPE)	/* total length, code, scope */
		{
			const unsigned char *after = document_end(at, end);

			if (after == NULL || (at = skip_string(at + 4, after)) == NULL || document_end(at, after) != after)
				return NULL;
			type = BSON_DOCUMENT;	/* the scope is a document like any other */
		}
		if (type == BSON_DOCUMENT || type == BSON_ARRAY)
		{
			if (depth + 1 == MAX_DEPTH || (ends[depth + 1] = document_end(at, end)) == NULL)
				return NULL;
			depth++;
			at += 4;
		}
		else if ((at = skip_scalar(type, at, end)) == NULL)
			return NULL;
	}
}

/*
 * Have glibc keep some memory between statements.  A page of documents takes and frees more than the 128 kB at the end
 * of the heap that it keeps by itself, so it would give them back and get them anew for every page: three brk() and as
 * many page faults, a tenth of what a page costs.  Once a mapped block has been freed it keeps twice its size
 * (mallopt(3), M_MMAP_THRESHOLD).  This is the place that every backend comes by that serves the gateway, and no other.
 */
static void
keep_memory(void)
{
	static bool kept = false;

	if (!kept)
	{
		void	   *volatile block = malloc(KEPT_BYTES / 2);

		free(block);
		kept = true;
	}
}

/* The argument itself, if it is 'many' documents one behind the other, or exactly one. */
static Datum
checked(PG_FUNCTION_ARGS, bool many)
{
	struct varlena *data = PG_GETARG_VARLENA_PP(0);
	const unsigned char *at = (const unsigned char *) VARDATA_ANY(data);
	const unsigned char *end = at + VARSIZE_ANY_EXHDR(data);
	bool		valid = many || at < end;

	keep_memory();
	while (valid && at < end)
	{
		at = check_document(at, end);
		valid = at != NULL && (many || at == end);
	}
	if (!valid)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_BINARY_REPRESENTATION),
				 errmsg("invalid BSON: a document is malformed, not in UTF-8, or nested more than %d levels deep", MAX_DEPTH)));
	PG_RETURN_POINTER(data);
}

/* ferretdb.checked_bson(bytea) */
Datum
ferretdb_checked_bson(PG_FUNCTION_ARGS)
{
	return checked(fcinfo, false);
}

/* ferretdb.checked_bsonsequence(bytea) */
Datum
ferretdb_checked_bsonsequence(PG_FUNCTION_ARGS)
{
	return checked(fcinfo, true);
}
