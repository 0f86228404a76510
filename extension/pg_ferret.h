/*
 * pg_ferret.h: what the files of the C part share.
 */
#pragma once

#include "postgres.h"

#include "storage/lwlock.h"

#include "status_layout.h"

#define FERRET_PROBLEM_BYTES 512
#define FERRET_CHANNEL_FD 3

/* The status table: slot 0 is the supervisor's, as in pg_ferret/status.py. */
typedef struct FerretShared
{
	LWLock	   *lock;
	int			launcher_pid;	/* 0: not running */
	int			starts;			/* launchers since one last got a database */
	char		problem[FERRET_PROBLEM_BYTES];	/* of the launcher itself; empty if there is none */
	FerretSlot	slots[FLEXIBLE_ARRAY_MEMBER];
} FerretShared;

/* pg_ferret.c: settings that the C part itself reads (settings.h defines them all) */
extern char *ferret_database;
extern int	ferret_max_workers;
extern char *ferret_python;
extern FerretShared *ferret_shared;

/* status.c */
extern Size ferret_shared_size(void);
extern void ferret_shared_init(void);
extern void ferret_store_slot(int index, const FerretSlot *slot);
extern void ferret_clear_slots(void);
extern void ferret_supervisor_state(int64 pid, int64 state, const char *last_exit, const char *message);
extern void ferret_problem(const char *text);

/* sql.c */
extern bool ferret_sql(const char *what, const char *sql, const char *search_path, char **result);
extern char *ferret_last_error(void);

/* launcher.c */
extern PGDLLEXPORT void ferret_launcher_main(Datum arg);
