/*
 * child.c: from the launcher, a PostgreSQL process, to the supervisor, which has
 * nothing left of one.
 */
#include "postgres.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pg_ferret.h"

#define CHANNEL_FD 3			/* the channel, in the supervisor */

/*
 * The forked child, up to exec: async-signal-safe calls only, and short, for it
 * is still attached to shared memory.
 */
static pg_noreturn void
exec_supervisor(int socket, pid_t parent, char **argv, char **envp)
{
	sigset_t	none;
	int			fd;
	char		failure[1 + sizeof(int32)] = "x";
	int32		reason;

	setsid();					/* PostgreSQL signals whole process groups */
	for (int i = 1; i < NSIG; i++)
		signal(i, SIG_DFL);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)	/* it died before prctl */
		_exit(127);

	/* dup2() onto itself would leave the descriptor to be closed by exec. */
	if (socket == CHANNEL_FD)
		fcntl(socket, F_SETFD, 0);
	else
		dup2(socket, CHANNEL_FD);
	if ((fd = open("/dev/null", O_RDWR)) >= 0)
	{
		dup2(fd, STDIN_FILENO);
		dup2(fd, STDOUT_FILENO);
	}
	close_range(CHANNEL_FD + 1, ~0U, 0);
	/* If memory runs out, a gateway is a better victim than the database. */
	if ((fd = open("/proc/self/oom_score_adj", O_WRONLY)) >= 0)
	{
		if (write(fd, "500", 3) < 0)
			reason = 0;			/* an older kernel's refusal changes nothing */
		close(fd);
	}
	if (chdir("/") == 0)
	{
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		execve(argv[0], argv, envp);
	}
	reason = errno;
	memcpy(failure + 1, &reason, sizeof(reason));
	send(CHANNEL_FD, failure, sizeof(failure), MSG_DONTWAIT | MSG_NOSIGNAL);
	_exit(127);
}

/*
 * Fork and execute a supervisor at the other end of a new channel.  Returns its
 * pid, or -1 with errno set.
 */
pid_t
fork_supervisor(int *channel)
{
	char	   *argv[] = {ferret_python, "-P", "-m", "supervisor", NULL};
	char	   *envp[] = {
		"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C.UTF-8", "PYTHONPATH=" PG_FERRET_PYTHON_DIR,
		/* glibc: large messages in mappings of their own, always, so that their memory is given back. */
		"MALLOC_MMAP_THRESHOLD_=4194304", "MALLOC_TRIM_THRESHOLD_=16777216",
		NULL
	};
	int			pair[2];
	int			reason;
	pid_t		self = getpid();
	pid_t		child;
	sigset_t	all,
				before;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
		return -1;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	child = fork();
	if (child == 0)
		exec_supervisor(pair[1], self, argv, envp);
	reason = errno;
	sigprocmask(SIG_SETMASK, &before, NULL);
	close(pair[1]);
	if (child < 0)
		close(pair[0]);
	else
		*channel = pair[0];
	errno = reason;
	return child;
}
