/*
 * pg_ferret.c: what happens when the postmaster loads the library.
 *
 * Defines the settings, asks for shared memory and registers the launcher.
 * No Python is in this library, nor in any process that is attached to
 * PostgreSQL's shared memory.
 */
#include "postgres.h"

#include <ctype.h>
#include <sys/un.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "pg_ferret.h"

PG_MODULE_MAGIC_EXT(.name = "pg_ferret", .version = PG_FERRET_VERSION);

static bool check_listen_addr(char **value, void **extra, GucSource source);
static bool check_absolute_path(char **value, void **extra, GucSource source);
static bool check_socket_path(char **value, void **extra, GucSource source);
static const char *show_octal(void);

#include "settings.h"

FerretShared *ferret_shared = NULL;

static shmem_request_hook_type previous_shmem_request = NULL;
static shmem_startup_hook_type previous_shmem_startup = NULL;

/*
 * Is [at, end) host:port or [IPv6]:port?  Syntax only, as parse_address() in
 * config/settings.py: check hooks run in every process.
 */
static bool
is_address(const char *at, const char *end)
{
	const char *host = at;
	int			port = 0;

	if (at < end && *at == '[')
	{
		while (++at < end && (isxdigit((unsigned char) *at) || *at == ':' || *at == '.'))
			;
		if (at == host + 1)
			return false;
		if (at < end && *at == '%')
		{
			const char *zone = at + 1;

			while (++at < end && (isalnum((unsigned char) *at) || strchr("._-", *at)))
				;
			if (at == zone)
				return false;
		}
		if (at == end || *at++ != ']')
			return false;
	}
	else
	{
		while (at < end && (isalnum((unsigned char) *at) || strchr("._-", *at)))
			at++;
		if (at == host)
			return false;
	}
	if (at == end || *at++ != ':' || at == end || end - at > 5)
		return false;
	for (; at < end; at++)
	{
		if (!isdigit((unsigned char) *at))
			return false;
		port = port * 10 + (*at - '0');
	}
	return port >= 1 && port <= 65535;
}

/* ferretdb.listen_addr: addresses separated by commas; "-" and nothing are none. */
static bool
check_listen_addr(char **value, void **extra, GucSource source)
{
	const char *blank = " \t\n\r\v\f";

	for (const char *item = *value; *item;)
	{
		const char *next = item + strcspn(item, ",");
		const char *end = next;

		item += strspn(item, blank);
		while (end > item && strchr(blank, end[-1]))
			end--;
		if (end > item && !(end - item == 1 && *item == '-') && !is_address(item, end))
		{
			GUC_check_errdetail("\"%.*s\" is not an address.", (int) (end - item), item);
			GUC_check_errhint("Write host:port or [IPv6]:port, several separated by commas, or - for none.");
			return false;
		}
		item = *next ? next + 1 : next;
	}
	return true;
}

/* A path that is absolute, or empty. */
static bool
check_absolute_path(char **value, void **extra, GucSource source)
{
	if (**value == '\0' || **value == '/')
		return true;
	GUC_check_errdetail("The path must be absolute.");
	return false;
}

/* ferretdb.listen_unix: a path that fits into a socket's address. */
static bool
check_socket_path(char **value, void **extra, GucSource source)
{
	size_t		limit = sizeof(((struct sockaddr_un *) 0)->sun_path) - 1;

	if (strlen(*value) <= limit)
		return check_absolute_path(value, extra, source);
	GUC_check_errdetail("The path of a Unix socket has at most %zu bytes.", limit);
	return false;
}

/* ferretdb.unix_socket_permissions, as PostgreSQL shows its own. */
static const char *
show_octal(void)
{
	static char text[12];

	snprintf(text, sizeof(text), "%04o", (unsigned int) ferret_unix_socket_permissions);
	return text;
}

/* The size of the status table and its head. */
static Size
shared_size(void)
{
	return offsetof(FerretShared, slots) + mul_size(SLOTS, sizeof(FerretSlot));
}

/* Ask for shared memory and a lock. */
static void
request_shared(void)
{
	if (previous_shmem_request)
		previous_shmem_request();
	RequestAddinShmemSpace(shared_size());
	RequestNamedLWLockTranche("pg_ferret", 1);
}

/* Create the status table; again after a crash, when everything starts anew. */
static void
create_shared(void)
{
	bool		found;

	if (previous_shmem_startup)
		previous_shmem_startup();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	ferret_shared = ShmemInitStruct("pg_ferret", shared_size(), &found);
	if (!found)
	{
		memset(ferret_shared, 0, shared_size());
		ferret_shared->lock = &GetNamedLWLockTranche("pg_ferret")->lock;
		ferret_shared->incarnation = GetCurrentTimestamp();
	}
	LWLockRelease(AddinShmemInitLock);
}

/* Have the postmaster start the launcher, on a hot standby as well. */
static void
register_launcher(void)
{
	BackgroundWorker worker = {
		.bgw_name = LAUNCHER_NAME,
		.bgw_type = LAUNCHER_NAME,
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_ConsistentState,
		.bgw_restart_time = 1,
		.bgw_library_name = "pg_ferret",
		.bgw_function_name = "ferret_launcher_main",
	};

	RegisterBackgroundWorker(&worker);
}

/* Called once, when the library is loaded. */
void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_ferret must be loaded via shared_preload_libraries"),
				 errhint("Set shared_preload_libraries = 'pg_cron,pg_documentdb_core,pg_documentdb,pg_ferret' and restart the server.")));

	define_settings();
	MarkGUCPrefixReserved("ferretdb");

	previous_shmem_request = shmem_request_hook;
	shmem_request_hook = request_shared;
	previous_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = create_shared;

	/* pg_upgrade starts servers: nobody must change data in the middle of it. */
	if (!IsBinaryUpgrade)
		register_launcher();
}
