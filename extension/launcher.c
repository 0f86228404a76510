/*
 * launcher.c: the background worker that starts the supervisor and serves it.
 *
 * One latch loop with deadlines.  Nothing in it may block, because it answers
 * ProcSignalBarrier for the whole cluster: messages are sent and received with
 * MSG_DONTWAIT, children are waited for with WNOHANG, SQL has a lock_timeout.
 */
#include "postgres.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "access/xlog.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/pmsignal.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "pg_ferret.h"

#define STOP_GRACE_MS 300		/* from SIGTERM to SIGKILL when we end */
#define LONGEST_DELAY_MS 30000
#define STEADY_MS 10000			/* a supervisor that lived so long did not fail early */
#define RECOVERY_POLL_MS 100	/* nothing tells of a promotion */
#define RESEND_MS 20			/* the channel was full */
#define REFRESH_RETRY_MS 1000
#define SUPERVISOR_TIMEOUT_MS 30000	/* it reports every second */
#define ABORT_GRACE_MS 1000		/* for its stack to be written */
#define MESSAGES_PER_ROUND 100
#define NEVER PG_INT64_MAX

/*
 * Lines of the configuration files that are not in force, and why; PostgreSQL's
 * own error says no more than that they could not be applied.
 */
#define SETTING_ERRORS \
	" (SELECT f.seqno, f.name, f.setting, f.sourcefile, f.sourceline," \
	"   CASE WHEN s.pending_restart AND CASE WHEN s.vartype <> 'integer' THEN true" \
	"      WHEN f.setting ~ '^[0-9]{1,9}$' THEN f.setting::int BETWEEN s.min_val::int AND s.max_val::int" \
	"      ELSE false END" \
	"     THEN 'takes effect when PostgreSQL is restarted'" \
	"    WHEN s.vartype IN ('integer', 'real')" \
	"     THEN format('%s, the range is %s .. %s%s', f.error, s.min_val, s.max_val, ' ' || s.unit)" \
	"    WHEN s.vartype = 'enum' THEN format('%s, it is one of %s', f.error, array_to_string(s.enumvals, ', '))" \
	"    ELSE f.error END AS error" \
	"  FROM pg_file_settings f LEFT JOIN pg_settings s ON lower(s.name) = lower(f.name)" \
	"  WHERE f.error IS NOT NULL AND (f.name IS NULL OR lower(f.name) LIKE 'ferretdb.%')) AS wrong"

/* The facts that the supervisor needs: checked() in config/check.py reads this. */
#define SETTINGS_SQL \
	"SELECT json_build_object(" \
	" 'settings', (SELECT json_object_agg(substr(name, 10), setting ORDER BY name)" \
	"  FROM pg_settings WHERE name LIKE 'ferretdb.%')," \
	" 'server', json_build_object(" \
	"  'socket_directories', current_setting('unix_socket_directories')," \
	"  'port', current_setting('port')::int," \
	"  'user', session_user," \
	"  'database', current_database()," \
	"  'data_directory', current_setting('data_directory')," \
	"  'max_connections', current_setting('max_connections')::int," \
	"  'superuser_reserved_connections', current_setting('superuser_reserved_connections')::int," \
	"  'reserved_connections', current_setting('reserved_connections')::int," \
	"  'version', split_part(current_setting('server_version'), ' ', 1)," \
	"  'documentdb', (SELECT extversion FROM pg_extension WHERE extname = 'documentdb')," \
	"  'cursor_files_seconds', (SELECT setting::int FROM pg_settings" \
	"   WHERE name = 'documentdb.defaultCursorExpiryTimeLimitSeconds' AND vartype = 'integer')," \
	"  'in_recovery', pg_is_in_recovery()," \
	"  'started', to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')," \
	"  'setting_errors', (SELECT coalesce(json_agg(json_build_object('name', coalesce(name, '')," \
	"    'setting', left(coalesce(setting, ''), 200), 'error', error) ORDER BY seqno), '[]') FROM" SETTING_ERRORS ")" \
	" ))"

/* The same errors for people. */
#define SETTING_ERRORS_SQL \
	"SELECT string_agg(format('%s: %s', coalesce(name, format('%s line %s', sourcefile, sourceline)), error), '; '" \
	"  ORDER BY seqno) FROM" SETTING_ERRORS

/*
 * The statement that prepares the database further; NULL if nothing is left to
 * do, empty if a standby has to wait for its primary.  Looking first, a start
 * writes no WAL.  PostGIS can't be created in pg_catalog, our search_path.
 */
/* DocumentDB's planner looks into its schemas for everybody's queries: without the grant pg_monitor could run none. */
#define NEXT_STEP_SQL \
	"SELECT CASE" \
	" WHEN ferret IS NOT NULL AND ferret = '" PG_FERRET_VERSION "' AND documentdb IS NOT NULL THEN NULL" \
	" WHEN pg_is_in_recovery() THEN ''" \
	" WHEN ferret IS NULL THEN 'CREATE EXTENSION pg_ferret VERSION ''" PG_FERRET_VERSION "'''" \
	" WHEN ferret <> '" PG_FERRET_VERSION "' THEN 'ALTER EXTENSION pg_ferret UPDATE TO ''" PG_FERRET_VERSION "'''" \
	" ELSE 'SET LOCAL search_path = public; CREATE EXTENSION documentdb CASCADE;" \
	" GRANT USAGE ON SCHEMA documentdb_core, documentdb_api_internal, documentdb_api_catalog TO pg_monitor' END" \
	" FROM (SELECT max(extversion) FILTER (WHERE extname = 'pg_ferret') AS ferret," \
	"  max(extversion) FILTER (WHERE extname = 'documentdb') AS documentdb FROM pg_extension) AS installed"

static volatile sig_atomic_t child_changed = false;

/* The supervisor, 0 if there is none, and our end of the channel, or -1. */
static pid_t supervisor = 0;
static int	channel = -1;
static int64 supervisor_born;
static int64 supervisor_heard;	/* when it last reported */
static bool supervisor_aborted;
static int64 round_began;

/* When to do what next, in milliseconds of the monotonic clock, and how often it failed. */
static int64 spawn_at = 0;
static int64 refresh_at = 0;
static int64 prepare_at = 0;
static int	spawn_failures = 0;
static int	prepare_failures = 0;

/* What the supervisor is to know, and whether it has been told. */
static char *settings = NULL;
static bool settings_told = false;
static bool in_recovery = false;
static bool role_told = true;
static int64 rollings_told = 0;

/* Lives for one round of the loop. */
static MemoryContext round_context;

/* Milliseconds of the monotonic clock. */
static int64
now_ms(void)
{
	return monotonic_ns() / 1000000;
}

/* The wait before the next try: nothing, 'first' milliseconds, twice that, and so on. */
static int64
delay_ms(int failures, int first)
{
	return failures < 1 ? 0 : Min((int64) first << Min(failures - 1, 16), LONGEST_DELAY_MS);
}

/* SIGCHLD: the supervisor's state may have changed. */
static void
handle_sigchld(SIGNAL_ARGS)
{
	child_changed = true;
	SetLatch(MyLatch);
}

/* Read settings and server facts again. */
static void
refresh(void)
{
	char	   *fresh;
	char	   *errors;
	ErrorData  *error;

	if (!run_sql(SETTINGS_SQL, &fresh, &error) || !run_sql(SETTING_ERRORS_SQL, &errors, &error))
	{
		set_trouble(TROUBLE_SETTINGS, psprintf("cannot read the settings: %s", error->message), error->hint);
		refresh_at = now_ms() + REFRESH_RETRY_MS;
		return;
	}
	refresh_at = NEVER;
	set_trouble(TROUBLE_SETTINGS, errors, NULL);
	if (settings && strcmp(settings, fresh) == 0)
		return;
	if (settings)
		pfree(settings);
	settings = MemoryContextStrdup(TopMemoryContext, fresh);
	settings_told = false;
}

/* What to change when the extensions cannot be created. */
static const char *
preparation_hint(const ErrorData *error, const char *step)
{
	const char *cron = GetConfigOption("cron.database_name", true, false);

	if (cron && strcmp(cron, ferret_database) != 0)
		return psprintf("ferretdb.database is \"%s\" and cron.database_name is \"%s\": set both to the same database and restart.",
						ferret_database, cron);
	if (error->hint || !step || !strstr(step, "documentdb"))
		return error->hint;
	return "DocumentDB must be installed, and shared_preload_libraries must be 'pg_cron,pg_documentdb_core,pg_documentdb,pg_ferret' in this order.";
}

/* Take one step of preparing the database: the extensions are the user's without a CREATE EXTENSION. */
static void
prepare(void)
{
	char	   *step = NULL;
	ErrorData  *error = NULL;

	if (run_sql(NEXT_STEP_SQL, &step, &error))
	{
		if (step == NULL || (*step && run_sql(step, NULL, &error)))
		{
			if (step)
				ereport(LOG, errmsg("pg_ferret: executed \"%s\" in database \"%s\"", step, ferret_database));
			prepare_failures = 0;
			prepare_at = step ? 0 : NEVER;
			refresh_at = 0;		/* the supervisor waits for DocumentDB's version */
			set_trouble(TROUBLE_DATABASE, NULL, NULL);
			return;
		}
	}
	prepare_failures++;
	prepare_at = now_ms() + delay_ms(prepare_failures, 1000);
	if (error)
		set_trouble(TROUBLE_DATABASE, psprintf("cannot prepare database \"%s\": %s", ferret_database, error->message),
					preparation_hint(error, step));
	else
		set_trouble(TROUBLE_DATABASE, "waiting for the primary to create the extensions documentdb and pg_ferret", NULL);
}

/* How often a rolling restart has been asked for. */
static int64
rollings(void)
{
	int64		count;

	LWLockAcquire(ferret_shared->lock, LW_SHARED);
	count = ferret_shared->rollings;
	LWLockRelease(ferret_shared->lock);
	return count;
}

/* Start a supervisor. */
static void
spawn(void)
{
	pid_t		child = fork_supervisor(&channel);

	if (child < 0)
	{
		char	   *text = psprintf("cannot start the supervisor: %s", strerror(errno));

		ereport(WARNING, errmsg("pg_ferret: %s", text));
		show_supervisor(0, FERRET_STATE_BACKOFF, text);
		spawn_at = now_ms() + delay_ms(++spawn_failures + 1, 100);
		return;
	}
	supervisor = child;
	supervisor_born = supervisor_heard = now_ms();
	supervisor_aborted = false;
	settings_told = false;
	role_told = true;			/* the settings say it */
	rollings_told = rollings(); /* all its workers will be new */
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	ferret_shared->generation++;
	LWLockRelease(ferret_shared->lock);
	show_supervisor(supervisor, FERRET_STATE_STARTING, NULL);
}

/* Send one message; false if the channel is full. */
static bool
tell(char verb, const char *body)
{
	struct iovec parts[] = {{&verb, 1}, {unconstify(char *, body), strlen(body)}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

	/* Of a supervisor that is gone we hear by SIGCHLD. */
	if (sendmsg(channel, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return true;
	if (errno == EMSGSIZE)
		ereport(LOG, errmsg("pg_ferret: message of %zu bytes does not fit into the channel", strlen(body)));
	return errno != EAGAIN && errno != EINTR && errno != ENOBUFS;
}

/* Is there something that the supervisor does not know yet? */
static bool
news(void)
{
	return channel >= 0 && !(settings_told && role_told && rollings_told == rollings());
}

/* Tell the supervisor what it does not know yet. */
static void
tell_news(void)
{
	int64		asked;

	if (channel < 0)
		return;
	if (!role_told)
		role_told = tell('R', in_recovery ? "standby" : "primary");
	if (!settings_told && settings)
		settings_told = tell('S', settings);
	if ((asked = rollings()) != rollings_told && tell('W', ""))
		rollings_told = asked;
}

/* A log line: one letter for the level, then UTF-8.  Never ERROR: that would be our own. */
static void
take_log(const char *body, size_t size)
{
	int			level;

	if (size < 1)
		return;
	level = *body == 'D' ? DEBUG1 : *body == 'I' ? LOG : WARNING;
	if (message_level_is_interesting(level))
		ereport(level,
				errmsg_internal("%s", clean_text(body + 1, size - 1)),
				errhidestmt(true), errhidecontext(true));
}

/* The child could not execute the interpreter. */
static void
take_failure(const char *body, size_t size)
{
	int32		reason;
	char	   *text;

	if (size != sizeof(reason))
		return;
	memcpy(&reason, body, sizeof(reason));
	text = psprintf("ferretdb.python: cannot execute \"%s\": %s", ferret_python, strerror(reason));
	if (strcmp(ferret_shared->slots[0].message, text) != 0)
		ereport(WARNING,
				errmsg("pg_ferret: %s", text),
				errhint("Set ferretdb.python to the path of Python 3.11 or later and reload the configuration."));
	show_supervisor(supervisor, FERRET_STATE_FAILED, text);
	set_setting_error("ferretdb.python", ferret_python, strerror(reason));
}

/* Is the supervisor a zombie?  It is left one, so that its process group's id stays taken. */
static bool
supervisor_ended(siginfo_t *info)
{
	info->si_pid = 0;
	return waitid(P_PID, supervisor, info, WEXITED | WNOHANG | WNOWAIT) == 0 && info->si_pid == supervisor;
}

/* Take in what the supervisor and its workers have sent; true if there may be more. */
static bool
receive(void)
{
	static char buffer[64 * 1024];

	for (int i = 0; channel >= 0 && i < MESSAGES_PER_ROUND; i++)
	{
		ssize_t		size = recv(channel, buffer, sizeof(buffer), MSG_DONTWAIT | MSG_TRUNC);

		/* ECONNRESET comes once, before what the dead have sent, if they left mail unread. */
		if (size < 0 && (errno == EINTR || errno == ECONNRESET))
			continue;
		if (size < 0)
			return false;
		if (size == 0)			/* nobody is there any more */
		{
			siginfo_t	info;
			int64		deadline = now_ms() + STOP_GRACE_MS;

			close(channel);
			channel = -1;
			/* An interpreter closes its files some time before it has ended, with a status that is worth knowing. */
			while (!supervisor_ended(&info) && now_ms() < deadline)
				pg_usleep(2000);
			kill(-supervisor, SIGKILL);
			return false;
		}
		if (size > (ssize_t) sizeof(buffer))
			continue;
		switch (buffer[0])
		{
			case 's':
				supervisor_heard = now_ms();
				take_slot((unsigned char *) buffer + 1, size - 1);
				break;
			case 'e':
				take_setting_errors(buffer + 1, size - 1);
				break;
			case 'l':
				take_log(buffer + 1, size - 1);
				break;
			case 'x':
				take_failure(buffer + 1, size - 1);
				break;
		}
	}
	return channel >= 0;
}

/* End what is left of the supervisor's process group and forget it. */
static void
bury(void)
{
	kill(-supervisor, SIGKILL);
	kill(supervisor, SIGKILL);	/* it may not be the leader of its group yet */
	while (waitpid(supervisor, NULL, 0) < 0 && errno == EINTR)
		;
	supervisor = 0;
	if (channel >= 0)
		close(channel);
	channel = -1;
}

/* The supervisor has ended unasked: clean up, say so, and have another one started. */
static void
reap(void)
{
	siginfo_t	info;
	pid_t		pid = supervisor;
	char		last_exit[sizeof(ferret_shared->last_exit)];
	bool		hopeless;

	child_changed = false;
	if (supervisor == 0 || !supervisor_ended(&info))
		return;
	kill(-supervisor, SIGKILL);
	for (int i = 0; i < 10 && receive(); i++)
		;						/* its last words */
	bury();

	if (info.si_code == CLD_EXITED)
		snprintf(last_exit, sizeof(last_exit), "exit %d", info.si_status);
	else
		snprintf(last_exit, sizeof(last_exit), "signal %s", sigabbrev_np(info.si_status));
	spawn_failures = now_ms() - supervisor_born >= STEADY_MS ? 0 : spawn_failures + 1;
	spawn_at = now_ms() + delay_ms(spawn_failures - 1, 100);

	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	ferret_shared->restarts++;
	strcpy(ferret_shared->last_exit, last_exit);
	memset(&ferret_shared->slots[1], 0, (SLOTS - 1) * sizeof(FerretSlot));
	/* Whoever could not start has told why. */
	hopeless = info.si_code == CLD_EXITED && ferret_shared->slots[0].number[SLOT_STATE] == FERRET_STATE_FAILED;
	LWLockRelease(ferret_shared->lock);
	if (hopeless)
		show_supervisor(supervisor, FERRET_STATE_FAILED, NULL);
	else
	{
		bool		mute = supervisor_heard == supervisor_born;

		show_supervisor(supervisor, FERRET_STATE_BACKOFF,
						psprintf("the supervisor ended with %s%s", last_exit, mute ? ", see ferretdb.python" : ""));
		ereport(WARNING,
				errmsg("pg_ferret: supervisor (PID %d) ended with %s, the next one starts in %d ms",
					   (int) pid, last_exit, (int) (spawn_at - now_ms())),
				mute ? errhint("It said nothing: is ferretdb.python (\"%s\") Python 3.11 or later with the packages of pg_ferret?",
							   ferret_python) : 0);
	}
}

/*
 * A supervisor that reports no more would not replace workers either: end it.
 * If it is us who stood still, it is not to blame.
 */
static void
watch_supervisor(void)
{
	int64		now = now_ms();
	int64		silent;

	if (now - round_began > SUPERVISOR_TIMEOUT_MS / 2)
		supervisor_heard = now;
	silent = now - supervisor_heard;
	if (supervisor == 0 || silent < SUPERVISOR_TIMEOUT_MS)
		return;
	if (!supervisor_aborted)
	{
		ereport(WARNING, errmsg("pg_ferret: supervisor (PID %d) has not reported for %d s: ending it",
								(int) supervisor, (int) (silent / 1000)));
		kill(supervisor, SIGABRT);
		kill(supervisor, SIGCONT);	/* a stopped process could not write its stack */
		supervisor_aborted = true;
	}
	else if (silent >= SUPERVISOR_TIMEOUT_MS + ABORT_GRACE_MS)
	{
		kill(supervisor, SIGKILL);
		supervisor_heard = now - SUPERVISOR_TIMEOUT_MS; /* should even that take time, don't spin */
	}
}

/* Before exit, for whatever reason: take the process tree along.  Without us, PDEATHSIG does that. */
static void
launcher_exit(int code, Datum arg)
{
	siginfo_t	info;

	if (supervisor)
	{
		int64		deadline = now_ms() + STOP_GRACE_MS;

		if (channel >= 0)
			tell('Q', "fast");
		kill(supervisor, SIGTERM);
		while (!supervisor_ended(&info) && now_ms() < deadline)
			pg_usleep(2000);
		bury();
	}
	if (!PostmasterIsAlive())
		return;					/* nobody will read it, and the lock may never be free */
	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	ferret_shared->launcher = 0;
	ferret_shared->setting_errors_size = 0;
	memset(ferret_shared->slots, 0, SLOTS * sizeof(FerretSlot));
	LWLockRelease(ferret_shared->lock);
}

/*
 * Connect to ferretdb.database.  A failure is FATAL and the postmaster starts us
 * again after a second, so launchers in vain are counted and made to wait here.
 */
static void
connect_database(void)
{
	int			failures = ferret_shared->connecting;
	int64		deadline = now_ms() + delay_ms(failures, 1000);

	/* What ALTER DATABASE or ALTER ROLE may have set must not break our SQL. */
	static const char *const overrides[][2] = {
		{"search_path", "pg_catalog"},
		{"synchronous_commit", "local"},
		{"lock_timeout", "2s"},
		{"transaction_timeout", "0"},
		{"default_transaction_read_only", "off"},
		{"default_transaction_isolation", "read committed"},
		{"event_triggers", "off"},
	};

	if (failures)
		set_trouble(TROUBLE_DATABASE, psprintf("cannot connect to database \"%s\", the line before in the server log tells why", ferret_database),
					"ferretdb.database must name an existing database, the same as cron.database_name.");
	/* The latch is set at the start, so one wait would not do. */
	for (int64 left; (left = deadline - now_ms()) > 0 && !ProcDiePending;)
	{
		WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, (long) left, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
	if (ProcDiePending)
		proc_exit(1);

	for (size_t i = 0; i < lengthof(overrides); i++)
		SetConfigOption(overrides[i][0], overrides[i][1], PGC_SUSET, PGC_S_OVERRIDE);
	ferret_shared->connecting = failures + 1;
	BackgroundWorkerInitializeConnection(ferret_database, NULL, 0);
	ferret_shared->connecting = 0;
	set_trouble(TROUBLE_DATABASE, NULL, NULL);
}

/* Take the signals, the exit path and the memory that the loop needs. */
static void
set_up(void)
{
	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGCHLD, handle_sigchld);
	pqsignal(SIGINT, SIG_IGN);
	BackgroundWorkerUnblockSignals();

	LWLockAcquire(ferret_shared->lock, LW_EXCLUSIVE);
	ferret_shared->launcher = MyProcPid;
	ferret_shared->launcher_proc = MyProcNumber;
	LWLockRelease(ferret_shared->lock);
	before_shmem_exit(launcher_exit, (Datum) 0);
	round_context = AllocSetContextCreate(TopMemoryContext, LAUNCHER_NAME, ALLOCSET_DEFAULT_SIZES);
	show_supervisor(supervisor, FERRET_STATE_STARTING, "");
}

/* The configuration was reloaded: everything that failed is worth another try at once. */
static void
reload(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	if (supervisor == 0)
		take_setting_errors("", 0); /* what was wrong may be mended: the next attempt will tell */
	refresh_at = prepare_at = spawn_at = 0;
	prepare_failures = spawn_failures = 0;
}

/* A standby that is promoted: the primary's duties are ours. */
static void
notice_promotion(void)
{
	if (in_recovery && !RecoveryInProgress())
	{
		in_recovery = role_told = false;
		refresh_at = prepare_at = 0;
		prepare_failures = 0;
	}
}

/* Sleep until something happens or is due. */
static void
rest(uint32 wait_event)
{
	int64		due = Min(refresh_at, prepare_at);
	int			events = WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH;
	int64		now = now_ms();

	if (supervisor == 0)
		due = Min(due, spawn_at);
	else
		due = Min(due, supervisor_heard + SUPERVISOR_TIMEOUT_MS + (supervisor_aborted ? ABORT_GRACE_MS : 0));
	if (news())
		due = Min(due, now + RESEND_MS);
	if (in_recovery)
		due = Min(due, now + RECOVERY_POLL_MS);
	if (channel >= 0)
		events |= WL_SOCKET_READABLE;
	due = Max(0, Min(due - now, SUPERVISOR_TIMEOUT_MS / 4));
	round_began = now;
	WaitLatchOrSocket(MyLatch, events, channel >= 0 ? channel : PGINVALID_SOCKET, (long) due, wait_event);
	ResetLatch(MyLatch);
}

/* The launcher's main function. */
void
ferret_launcher_main(Datum arg)
{
	uint32		wait_event;

	set_up();
	connect_database();
	wait_event = WaitEventExtensionNew("FerretMain");
	in_recovery = RecoveryInProgress();
	MemoryContextSwitchTo(round_context);

	for (;;)
	{
		MemoryContextReset(round_context);
		if (ProcDiePending)		/* quietly: CHECK_FOR_INTERRUPTS would be FATAL */
			proc_exit(1);		/* after 0 the postmaster would not start us again */
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload();
		receive();
		if (child_changed)
			reap();
		watch_supervisor();
		notice_promotion();
		/* The supervisor must not wait for DDL, which may wait for locks. */
		if (supervisor == 0 && now_ms() >= spawn_at)
			spawn();
		if (now_ms() >= refresh_at)
			refresh();
		tell_news();
		if (now_ms() >= prepare_at)
			prepare();
		rest(wait_event);
	}
}
