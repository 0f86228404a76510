/*
 * bson.h: reading BSON (https://bsonspec.org/spec.html).
 */
#ifndef PG_FERRET_BSON_H
#define PG_FERRET_BSON_H

#include "fmgr.h"

/* Types of values. */
#define BSON_DOCUMENT 0x03
#define BSON_ARRAY 0x04
#define BSON_CODE_WITH_SCOPE 0x0F
#define BSON_INT32 0x10
#define BSON_INT64 0x12

/* A little-endian int32 at any address. */
static inline int32
read_int32(const unsigned char *at)
{
	return (int32) ((uint32) at[0] | (uint32) at[1] << 8 | (uint32) at[2] << 16 | (uint32) at[3] << 24);
}

/* bson_check.c */
extern const unsigned char *skip_value(unsigned char type, const unsigned char *at, const unsigned char *end);
extern Datum ferretdb_checked_bson(PG_FUNCTION_ARGS);

#endif
