/*
 * launcher.c: the background worker.  It keeps one supervisor process running,
 * tells it the settings, and publishes what it reports.
 *
 * Nothing in its loop may block: like every backend it has to answer
 * ProcSignalBarriers, or a DROP DATABASE elsewhere hangs.
 */
#include "pg_ferret.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "access/xlog.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define GRACE_MS 300			/* for the supervisor, at exit */
#define LONGEST_WAIT_MS 10000
#define RECOVERY_POLL_MS 100	/* promotion sends no signal */
#define LONGEST_BACKOFF_MS 30000
#define GOOD_LIFE_MS 60000		/* a supervisor that lived so long did not die early */
#define MESSAGE_BYTES 65536
#define MESSAGES_AT_ONCE 100
#define OOM_SCORE "500"			/* the OOM killer takes Python before PostgreSQL */

static const char *const settings_sql =
	"SELECT json_build_object("
	"'settings', (SELECT json_object_agg(substr(name, 10), setting) FROM pg_settings WHERE name LIKE 'ferretdb.%'),"
	"'server', json_build_object("
	"'socket_directories', current_setting('unix_socket_directories'),"
	"'port', current_setting('port')::int,"
	"'user', session_user,"
	"'database', current_database(),"
	"'data_directory', current_setting('data_directory'),"
	"'max_connections', current_setting('max_connections')::int,"
	"'superuser_reserved_connections', current_setting('superuser_reserved_connections')::int,"
	"'reserved_connections', current_setting('reserved_connections')::int,"
	"'version', split_part(current_setting('server_version'), ' ', 1),"
	"'documentdb', (SELECT extversion FROM pg_extension WHERE extname = 'documentdb'),"
	"'in_recovery', pg_is_in_recovery(),"
	"'started', pg_postmaster_start_time(),"
	"'setting_errors', (SELECT coalesce(json_agg(json_build_object('name', name, 'setting', coalesce(setting, ''), 'error', error)), '[]')"
	" FROM pg_file_settings WHERE name LIKE 'ferretdb.%' AND error IS NOT NULL)))";

static const char *const file_errors_sql =
	"SELECT string_agg(format('%s = %L: %s', name, setting, error), '; ')"
	" FROM pg_file_settings WHERE name LIKE 'ferretdb.%' AND error IS NOT NULL";

/* What is missing: the name of the next step of bootstrap(), or nothing. */
static const char *const missing_sql =
	"SELECT CASE"
	" WHEN NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_ferret') THEN 'CREATE EXTENSION pg_ferret'"
	" WHEN (SELECT extversion FROM pg_extension WHERE extname = 'pg_ferret') IS DISTINCT FROM"
	" (SELECT default_version FROM pg_available_extensions WHERE name = 'pg_ferret') THEN 'ALTER EXTENSION pg_ferret UPDATE'"
	" WHEN NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'documentdb') THEN 'CREATE EXTENSION documentdb CASCADE'"
	" END";

static pid_t supervisor = 0;	/* also its process group; 0: none */
static int	channel = -1;
static bool channel_ended = false;
static TimestampTz born = 0;
static TimestampTz next_spawn = 0;
static int	early_deaths = 0;
static char *exec_failure = NULL;
static char *settings = NULL;	/* the last message made */
static bool settings_stale = true;
static bool settings_unsent = false;
static bool role_unsent = false;
static bool in_recovery = false;
static bool bootstrap_due = true;
static TimestampTz next_bootstrap = 0;
static int	bootstrap_failures = 0;

/* 0, 100, 200, 400 … ms, at most 30 s. */
static int
backoff_ms(int failures)
{
	return failures == 0 ? 0 : Min(LONGEST_BACKOFF_MS, 100 << Min(failures - 1, 10));
}

/* A child has ended: the loop shall look. */
static void
on_sigchld(SIGNAL_ARGS)
{
	SetLatch(MyLatch);
}

/* Send one message; false if the channel is full for now.  A dead peer is SIGCHLD's business. */
static bool
send_message(char verb, const char *text)
{
	size_t		length = strlen(text);
	char	   *message = palloc(length + 1);
	ssize_t		sent;

	message[0] = verb;
	memcpy(message + 1, text, length);
	sent = send(channel, message, length + 1, MSG_DONTWAIT | MSG_NOSIGNAL);
	pfree(message);
	return sent >= 0 || (errno != EAGAIN && errno != EINTR && errno != ENOBUFS);
}

/* A line of the supervisor or a worker, for PostgreSQL's log. */
static void
log_line(char letter, char *text, int length)
{
	int			level = letter == 'D' ? DEBUG1 : letter == 'I' ? LOG : WARNING;

	/* Broken UTF-8 would break the readers of the log. */
	if (!pg_verify_mbstr(PG_UTF8, text, length, true))
		for (int i = 0; i < length; i++)
			if (IS_HIGHBIT_SET(text[i]) || text[i] == '\0')
				text[i] = '?';
	ereport(level, (errmsg_internal("%.*s", length, text), errhidestmt(true), errhidecontext(true)));
}

/* The interpreter could not be started. */
static void
take_exec_failure(int error)
{
	errno = error;
	exec_failure = MemoryContextStrdup(TopMemoryContext,
									   psprintf("ferretdb.python: cannot run \"%s\": %s", ferret_python, strerror(error)));
	ereport(LOG,
			(errmsg("pg_ferret: could not run \"%s\": %m", ferret_python),
			 errhint("Set ferretdb.python to a Python interpreter and reload the configuration.")));
}

/* Take what the supervisor and the workers sent, a bounded number of messages. */
static void
receive_messages(void)
{
	static char message[MESSAGE_BYTES];

	for (int i = 0; i < MESSAGES_AT_ONCE && channel >= 0 && !channel_ended; i++)
	{
		ssize_t		length = recv(channel, message, sizeof(message), MSG_DONTWAIT | MSG_TRUNC);

		if (length < 0)
		{
			/* A peer that died with unread messages resets once; what it sent comes after that. */
			if (errno == EINTR || errno == ECONNRESET)
				continue;
			return;
		}
		if (length == 0)
			channel_ended = true;
		else if (length > MESSAGE_BYTES)
			elog(LOG, "pg_ferret: dropped a message of %zd bytes", length);
		else if (message[0] == 's' && length == 1 + sizeof(int32) + sizeof(FerretSlot))
		{
			int32		index;
			FerretSlot	slot;

			memcpy(&index, message + 1, sizeof(index));
			memcpy(&slot, message + 1 + sizeof(index), sizeof(slot));
			ferret_store_slot(index, &slot);
		}
		else if (message[0] == 'l' && length > 2)
			log_line(message[1], message + 2, length - 2);
		else if (message[0] == 'x' && length == 1 + sizeof(int32))
		{
			int32		error;

			memcpy(&error, message + 1, sizeof(error));
			take_exec_failure(error);
		}
	}
}

/*
 * Between fork and exec: only what is async-signal-safe, in this order.  Until
 * exec the child is still attached to shared memory, so it must not linger.
 */
static void
run_interpreter(int fd, pid_t parent, char *const argv[], char *const envp[])
{
	sigset_t	none;
	struct sigaction default_action;
	char		failure[1 + sizeof(int32)] = {'x'};
	int			null;
	int			oom;
	int32		error;

	setsid();					/* PostgreSQL signals whole process groups */
	memset(&default_action, 0, sizeof(default_action));
	default_action.sa_handler = SIG_DFL;
	for (int number = 1; number < NSIG; number++)
		sigaction(number, &default_action, NULL);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)	/* it died before prctl: no signal will come */
		_exit(1);
	null = open("/dev/null", O_RDWR);
	dup2(null, 0);
	dup2(null, 1);
	if (fd == FERRET_CHANNEL_FD)
		fcntl(fd, F_SETFD, 0);	/* dup2 onto itself would leave close-on-exec set */
	else
		dup2(fd, FERRET_CHANNEL_FD);
	close_range(FERRET_CHANNEL_FD + 1, ~0U, 0);
	oom = open("/proc/self/oom_score_adj", O_WRONLY);
	if (oom >= 0)
	{
		(void) !write(oom, OOM_SCORE, strlen(OOM_SCORE));	/* only a preference */
		close(oom);
	}
	if (chdir("/") < 0)
		_exit(1);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execve(argv[0], argv, envp);
	error = errno;
	memcpy(failure + 1, &error, sizeof(error));
	send(FERRET_CHANNEL_FD, failure, sizeof(failure), MSG_NOSIGNAL);
	_exit(127);
}

/* Fork and execute the supervisor. */
static void
spawn(void)
{
	char	   *argv[] = {ferret_python, "-P", "-m", "supervisor", NULL};
	char	   *envp[] = {"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C.UTF-8", "PYTHONPATH=" PG_FERRET_PYTHON_DIR, NULL};
	pid_t		parent = getpid();
	pid_t		child = -1;
	int			pair[2];
	sigset_t	all;
	sigset_t	before;

	born = GetCurrentTimestamp();
	next_spawn = TimestampTzPlusMilliseconds(born, LONGEST_BACKOFF_MS);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0)
	{
		sigfillset(&all);
		sigprocmask(SIG_SETMASK, &all, &before);
		child = fork();
		if (child == 0)
			run_interpreter(pair[1], parent, argv, envp);
		sigprocmask(SIG_SETMASK, &before, NULL);
		close(pair[1]);
		if (child < 0)
			close(pair[0]);
	}
	if (child < 0)
	{
		ereport(LOG, (errmsg("pg_ferret: could not start the supervisor: %m")));
		ferret_supervisor_state(0, FERRET_STATE_BACKOFF, NULL, "could not start the supervisor, see PostgreSQL's log");
		return;
	}
	supervisor = child;
	channel = pair[0];
	channel_ended = false;
	settings_unsent = true;
	settings_stale = true;
	role_unsent = false;
	ferret_supervisor_state(child, FERRET_STATE_STARTING, NULL, "starting");
}

/* If the supervisor has ended: end what it left behind, tell, and plan the next one. */
static void
reap(void)
{
	siginfo_t	info = {0};
	int			status;
	int			delay;
	char		last_exit[32];
	char	   *message;

	if (supervisor == 0 || waitid(P_PID, supervisor, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0)
		return;
	/* The zombie still holds the group's id, so this hits its workers and nobody else. */
	kill(-supervisor, SIGKILL);
	receive_messages();
	while (waitpid(supervisor, &status, 0) < 0 && errno == EINTR)
		;
	supervisor = 0;
	close(channel);
	channel = -1;
	if (TimestampDifferenceExceeds(born, GetCurrentTimestamp(), GOOD_LIFE_MS))
		early_deaths = 0;
	delay = backoff_ms(early_deaths++);
	next_spawn = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
	if (WIFSIGNALED(status))
		snprintf(last_exit, sizeof(last_exit), "signal %s", sigabbrev_np(WTERMSIG(status)));
	else
		snprintf(last_exit, sizeof(last_exit), "exit %d", WEXITSTATUS(status));
	if (exec_failure)
		message = pstrdup(exec_failure);
	else
	{
		message = psprintf("supervisor ended (%s), see PostgreSQL's log; starting it again in %d ms", last_exit, delay);
		ereport(LOG, (errmsg("pg_ferret: %s", message)));
	}
	ferret_clear_slots();
	ferret_supervisor_state(0, exec_failure ? FERRET_STATE_FAILED : FERRET_STATE_BACKOFF, last_exit, message);
	pfree(message);
	if (exec_failure)
		pfree(exec_failure);
	exec_failure = NULL;
}

/* Make the settings message anew and send it if it differs from the last one. */
static void
send_settings(void)
{
	char	   *text;

	if (settings_stale)
	{
		settings_stale = false;
		if (ferret_sql("pg_ferret: read settings", settings_sql, NULL, &text) && text)
		{
			if (settings == NULL || strcmp(settings, text) != 0)
			{
				if (settings)
					pfree(settings);
				settings = MemoryContextStrdup(TopMemoryContext, text);
				settings_unsent = true;
			}
			pfree(text);
		}
		else
			ereport(LOG, (errmsg("pg_ferret: could not read the settings: %s", ferret_last_error())));
	}
	if (settings_unsent && settings && supervisor != 0)
		settings_unsent = !send_message('S', settings);
	if (role_unsent && supervisor != 0)
		role_unsent = !send_message('R', in_recovery ? "standby" : "primary");
}

/* Show the settings in files that PostgreSQL could not apply, or take that back. */
static void
check_files(void)
{
	char	   *errors;

	if (ferret_sql("pg_ferret: check files", file_errors_sql, NULL, &errors))
		ferret_problem(errors ? errors : "");
	if (errors)
		pfree(errors);
}

/*
 * Have the extensions there.  Looking first means that a restart writes no WAL
 * and takes no locks.  pg_ferret comes before documentdb, so that a failure of
 * the latter can be seen in ferretdb.status.
 */
static void
bootstrap(void)
{
	char	   *step = NULL;
	bool		ok;

	for (int steps = 0; (ok = ferret_sql("pg_ferret: look for extensions", missing_sql, NULL, &step)) && step && steps < 4; steps++)
	{
		/* PostGIS, which documentdb needs, cannot live in pg_catalog. */
		ok = ferret_sql(step, step, strstr(step, "documentdb") ? "public" : NULL, NULL);
		if (!ok)
			break;
		ereport(LOG, (errmsg("pg_ferret: %s", step)));
		settings_stale = true;
	}
	if (step)
		pfree(step);
	bootstrap_due = !ok;
	if (ok)
	{
		if (bootstrap_failures > 0)
			ferret_problem("");
		bootstrap_failures = 0;
		return;
	}
	next_bootstrap = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 10 * backoff_ms(++bootstrap_failures));
	ereport(LOG, (errmsg("pg_ferret: %s", ferret_last_error())));
	ferret_problem(ferret_last_error());
}

/* Follow changes of configuration and role. */
static void
follow_server(void)
{
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		settings_stale = true;
		early_deaths = 0;
		next_spawn = 0;
		bootstrap_due = true;
		next_bootstrap = 0;
		check_files();
	}
	if (in_recovery != RecoveryInProgress())
	{
		in_recovery = !in_recovery;
		role_unsent = true;
		settings_stale = true;
		bootstrap_due = true;
		next_bootstrap = 0;
	}
}

/* Milliseconds until something is to be done without being told. */
static long
wait_ms(void)
{
	TimestampTz now = GetCurrentTimestamp();
	long		wait = in_recovery ? RECOVERY_POLL_MS : LONGEST_WAIT_MS;

	if (supervisor == 0)
		wait = Min(wait, TimestampDifferenceMilliseconds(now, next_spawn));
	if (bootstrap_due && !in_recovery)
		wait = Min(wait, TimestampDifferenceMilliseconds(now, next_bootstrap));
	if (settings_unsent || role_unsent)
		wait = Min(wait, 100);
	return Max(wait, 0);
}

/* At exit, whatever the reason: nothing of ours may outlive us. */
static void
end_supervisor(int code, Datum arg)
{
	ferret_shared->launcher_pid = 0;
	if (supervisor == 0)
		return;
	if (!channel_ended)
		send_message('Q', "fast");
	kill(supervisor, SIGTERM);
	for (int waited = 0; waited < GRACE_MS; waited += 2)
	{
		siginfo_t	info = {0};

		if (waitid(P_PID, supervisor, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid != 0)
			break;
		pg_usleep(2000L);
	}
	kill(-supervisor, SIGKILL);
	waitpid(supervisor, NULL, 0);
	supervisor = 0;
}

/* Wait before connecting if earlier launchers failed to: a wrong ferretdb.database must not spin. */
static void
wait_for_turn(void)
{
	int			failures = ferret_shared->starts++;
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 5 * backoff_ms(failures));
	long		left;

	if (failures > 0)
		ferret_problem(psprintf("cannot use database \"%s\" (ferretdb.database), see PostgreSQL's log", ferret_database));
	while ((left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline)) > 0)
	{
		WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, left, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		if (ProcDiePending)
			proc_exit(1);
		CHECK_FOR_INTERRUPTS();
	}
}

/* Settings of the database or of roles must not reach the launcher's own SQL. */
static void
protect_session(void)
{
	static const char *const fixed[][2] = {
		{"search_path", "pg_catalog"},
		{"synchronous_commit", "local"},	/* an absent synchronous standby must not hang us */
		{"lock_timeout", "2s"},
		{"transaction_timeout", "0"},
		{"default_transaction_read_only", "off"},
		{"event_triggers", "off"},
	};

	for (int i = 0; i < (int) lengthof(fixed); i++)
		SetConfigOption(fixed[i][0], fixed[i][1], PGC_SUSET, PGC_S_OVERRIDE);
}

/* The background worker's main function. */
void
ferret_launcher_main(Datum arg)
{
	uint32		wait_event;

	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGINT, SIG_IGN);	/* pg_cancel_backend would end us outside SQL */
	pqsignal(SIGCHLD, on_sigchld);
	BackgroundWorkerUnblockSignals();
	before_shmem_exit(end_supervisor, 0);

	ferret_shared->launcher_pid = MyProcPid;
	wait_for_turn();
	protect_session();
	BackgroundWorkerInitializeConnection(ferret_database, NULL, 0);
	ferret_shared->starts = 0;
	ferret_problem("");
	check_files();
	wait_event = WaitEventExtensionNew("FerretMain");
	in_recovery = RecoveryInProgress();

	for (;;)
	{
		/* Quietly, and never with status 0: PostgreSQL would not start us again. */
		if (ProcDiePending)
			proc_exit(1);
		CHECK_FOR_INTERRUPTS();
		follow_server();
		reap();
		if (supervisor == 0 && GetCurrentTimestamp() >= next_spawn)
			spawn();
		send_settings();
		if (bootstrap_due && !in_recovery && GetCurrentTimestamp() >= next_bootstrap)
		{
			bootstrap();
			send_settings();
		}
		receive_messages();
		WaitLatchOrSocket(MyLatch,
						  WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH | (channel >= 0 && !channel_ended ? WL_SOCKET_READABLE : 0),
						  channel, wait_ms(), wait_event);
		ResetLatch(MyLatch);
	}
}
