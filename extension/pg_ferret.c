/*
 * pg_ferret.c: what happens when PostgreSQL loads the library: settings, shared
 * memory, registration of the launcher.
 */
#include "pg_ferret.h"

#include <sys/un.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/guc.h"
#include "utils/varlena.h"

PG_MODULE_MAGIC_EXT(
					.name = "pg_ferret",
					.version = "0.1.0"
);

#define RESTART_SECONDS 1

FerretShared *ferret_shared = NULL;

static shmem_request_hook_type previous_shmem_request = NULL;
static shmem_startup_hook_type previous_shmem_startup = NULL;

/* Whether 'text' looks like host:port; the supervisor knows whether it can be listened on. */
static bool
is_address(const char *text)
{
	const char *colon = strrchr(text, ':');
	char	   *end;
	long		port;

	if (colon == NULL || colon == text)
		return false;
	if (text[0] == '[' ? colon[-1] != ']' : memchr(text, ':', colon - text) != NULL)
		return false;
	errno = 0;
	port = strtol(colon + 1, &end, 10);
	return errno == 0 && end != colon + 1 && *end == '\0' && port > 0 && port < 65536 && colon[1] >= '0' && colon[1] <= '9';
}

/* GUC check hook: a list of addresses, or "-". */
static bool
check_listen_addr(char **newval, void **extra, GucSource source)
{
	char	   *copy = pstrdup(*newval);
	List	   *parts;
	ListCell   *cell;
	bool		valid = true;

	if (!SplitGUCList(copy, ',', &parts))
	{
		GUC_check_errdetail("List syntax is invalid.");
		valid = false;
	}
	else
	{
		foreach(cell, parts)
		{
			const char *part = lfirst(cell);

			if (strcmp(part, "-") != 0 && !is_address(part))
			{
				GUC_check_errdetail("\"%s\" is not of the form host:port.", part);
				GUC_check_errhint("For example '127.0.0.1:27017' or '[::1]:27017'; '-' listens nowhere.");
				valid = false;
				break;
			}
		}
		list_free(parts);
	}
	pfree(copy);
	return valid;
}

/* GUC check hook: an absolute path, or nothing. */
static bool
check_absolute_path(char **newval, void **extra, GucSource source)
{
	if (**newval == '\0' || is_absolute_path(*newval))
		return true;
	GUC_check_errdetail("The path must be absolute.");
	return false;
}

/* GUC check hook: a path that fits into a socket address, or nothing. */
static bool
check_socket_path(char **newval, void **extra, GucSource source)
{
	if (strlen(*newval) >= sizeof(((struct sockaddr_un *) NULL)->sun_path))
	{
		GUC_check_errdetail("The path of a Unix socket can have at most %d bytes.",
							(int) sizeof(((struct sockaddr_un *) NULL)->sun_path) - 1);
		return false;
	}
	return check_absolute_path(newval, extra, source);
}

static const char *show_octal(void);

#include "settings.h"

/* GUC show hook: as postgresql.conf has it. */
static const char *
show_octal(void)
{
	static char text[12];

	snprintf(text, sizeof(text), "%04o", ferret_unix_socket_permissions);
	return text;
}

/* Ask for the status table and its lock. */
static void
request_shmem(void)
{
	if (previous_shmem_request)
		previous_shmem_request();
	RequestAddinShmemSpace(ferret_shared_size());
	RequestNamedLWLockTranche("pg_ferret", 1);
}

/* Find the status table, or make it; after a crash restart it is made anew. */
static void
startup_shmem(void)
{
	if (previous_shmem_startup)
		previous_shmem_startup();
	ferret_shared_init();
}

/* Have the postmaster start the launcher as soon as it can read the database. */
static void
register_launcher(void)
{
	BackgroundWorker worker = {0};

	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_ConsistentState;
	worker.bgw_restart_time = RESTART_SECONDS;
	strlcpy(worker.bgw_library_name, "pg_ferret", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "ferret_launcher_main", sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "pg_ferret launcher", sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, "pg_ferret launcher", sizeof(worker.bgw_type));
	RegisterBackgroundWorker(&worker);
}

/* Called once, by the postmaster or by a backend that loads the library too late. */
void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_ferret must be loaded via \"shared_preload_libraries\""),
				 errhint("Add pg_ferret to the end of shared_preload_libraries in postgresql.conf and restart PostgreSQL.")));

	define_settings();
	MarkGUCPrefixReserved("ferretdb");

	previous_shmem_request = shmem_request_hook;
	shmem_request_hook = request_shmem;
	previous_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;

	/* pg_upgrade starts servers in which nobody but itself may write. */
	if (!IsBinaryUpgrade)
		register_launcher();
}
