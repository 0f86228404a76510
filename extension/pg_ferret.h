/*
 * pg_ferret.h: what the parts of the library share.
 */
#ifndef PG_FERRET_H
#define PG_FERRET_H

#include "storage/lwlock.h"
#include "storage/procnumber.h"

#include "status_layout.h"

#define LAUNCHER_NAME "pg_ferret launcher"

/* Workers may have their successors beside them: as many slots again, and the supervisor's. */
#define SLOTS (2 * ferret_max_workers + 1)

/* What can be wrong on the launcher's side, each shown in slot 0's message. */
enum
{
	TROUBLE_DATABASE,			/* connecting, creating the extensions */
	TROUBLE_SETTINGS,			/* reading them, or lines of the files that were refused */
	TROUBLES
};

/* In shared memory.  The launcher alone writes, under the lock (but rollings); what it reads of its own needs none. */
typedef struct FerretShared
{
	LWLock	   *lock;
	int64		incarnation;	/* of shared memory; never changes */
	pid_t		launcher;		/* 0 if there is none */
	ProcNumber	launcher_proc;	/* whose latch wakes it */
	int64		rollings;		/* calls of ferretdb.restart_workers() */
	int			connecting;		/* launchers started since one could connect */
	int64		generation;		/* supervisors started */
	int64		restarts;		/* supervisors that ended without being asked to */
	char		last_exit[sizeof(((FerretSlot *) 0)->last_exit)];
	char		trouble[TROUBLES][512];
	size_t		setting_errors_size;
	char		setting_errors[8192];	/* name, value, error, name, ...: each ends in NUL */
	FerretSlot	slots[FLEXIBLE_ARRAY_MEMBER];	/* SLOTS of them */
} FerretShared;

/* pg_ferret.c */
extern FerretShared *ferret_shared;
extern char *ferret_database;
extern char *ferret_python;
extern int	ferret_max_workers;

/* launcher.c */
extern PGDLLEXPORT void ferret_launcher_main(Datum arg);

/* child.c */
extern pid_t fork_supervisor(int *channel);

/* sql.c */
extern bool run_sql(const char *sql, char **value, ErrorData **error);

/* status.c */
extern int64 monotonic_ns(void);
extern char *clean_text(const char *data, size_t size);
extern void set_trouble(int subject, const char *text, const char *hint);
extern void show_supervisor(pid_t supervisor, int state, const char *message);
extern void take_slot(const unsigned char *body, size_t size);
extern void take_setting_errors(const char *body, size_t size);
extern void set_setting_error(const char *name, const char *value, const char *error);

#endif
