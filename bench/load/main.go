// Command load drives one MongoDB server with one operation through the official Go driver: in a closed loop, or at a
// rate.
//
// With -setup it loads the documents that the operations read. Otherwise it connects, prepares, and prints "ready". Then,
// -turns times, it waits for a line on standard input, runs for its part of -seconds and prints one JSON object (type
// result): all that it has measured so far. At last it cleans up. Its caller takes the CPU clocks of the servers when it
// says go and when the result comes, and may have another one run between two turns.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"
)

// result is what one run measured. Times are microseconds, but for Seconds.
type result struct {
	Ops       int     `json:"ops"`
	Seconds   float64 `json:"seconds"`
	P50       float64 `json:"p50"`
	P99       float64 `json:"p99"`
	P999      float64 `json:"p999"`
	Max       float64 `json:"max"`
	Errors    int     `json:"errors"`
	Error     string  `json:"error,omitempty"`
	DriverCPU float64 `json:"driver_cpu"` // seconds of CPU this process took
}

// client is one of the concurrent loops.
type client struct {
	number    int
	random    *rand.Rand
	zipf      *rand.Zipf
	db        *mongo.Database
	records   []record // what it inserts, made when it first does
	latencies []time.Duration
	last      time.Time // when the last of these ended
	errors    int
	err       error
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run() error {
	uri := flag.String("uri", "mongodb://127.0.0.1:27017/", "the server")
	database := flag.String("db", "bench", "database for all collections")
	name := flag.String("op", "find", "operation")
	clients := flag.Int("clients", 16, "concurrent clients")
	seconds := flag.Float64("seconds", 3, "length of the measurement")
	turns := flag.Int("turns", 1, "in how many parts it is made")
	rate := flag.Int("rate", 0, "requests that all clients together send a second, answered or not; 0: a closed loop")
	setup := flag.Bool("setup", false, "load the documents instead")
	flag.Parse()

	if *rate == 0 { // a pace needs finer timers
		if err := calm(); err != nil {
			return err
		}
	}
	// The generator shares the machine with what it measures: rather memory than CPU.
	debug.SetGCPercent(800)
	ctx := context.Background()
	switch *name {
	case "idle":
		return idle(*uri, *database, *clients)
	case "connect":
		return report(connectStorm(*uri, *clients, *turns, *seconds))
	}
	opts := options.Client().ApplyURI(*uri).SetMaxPoolSize(uint64(*clients)).SetMaxConnecting(16).
		SetServerSelectionTimeout(10 * time.Second)
	connection, err := mongo.Connect(opts)
	if err != nil {
		return err
	}
	defer connection.Disconnect(ctx)
	db := connection.Database(*database)
	if *setup {
		return load(ctx, db)
	}
	op, ok := operations[*name]
	if !ok {
		return fmt.Errorf("no operation %q", *name)
	}
	if err := report(measure(ctx, db, op, *clients, *rate, *turns, *seconds)); err != nil {
		return err
	}
	if op.cleanup == nil {
		return nil
	}
	return op.cleanup(ctx, db)
}

// calm runs this program again with timers of a millisecond. Go's runtime looks after its threads every 20 us (which Linux
// makes 70), and each time takes the processor from whoever is at work there: the gateway, at every other update, by
// something that is not there when its clients are on other machines.
func calm() error {
	const done, prSetTimerSlack = "LOAD_IS_CALM", 29
	if os.Getenv(done) != "" {
		return nil
	}
	runtime.LockOSThread() // exec keeps the slack of the thread that calls it
	if _, _, failed := syscall.Syscall(syscall.SYS_PRCTL, prSetTimerSlack, uintptr(time.Millisecond), 0); failed != 0 {
		return fmt.Errorf("prctl: %w", failed)
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), done+"=1"))
}

func report(r *result, err error) error {
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// measure runs one operation in `count` loops for the given time, in turns, at `rate` a second if that is not 0. A client
// that does something else leaves out its share of them.
func measure(
	ctx context.Context, db *mongo.Database, op operation, count, rate, turns int, seconds float64,
) (*result, error) {
	if op.prepare != nil {
		if err := op.prepare(ctx, db, count, seconds); err != nil {
			return nil, fmt.Errorf("prepare: %w", err)
		}
	}
	clients := make([]*client, count)
	for i := range clients {
		random := rand.New(rand.NewPCG(uint64(i), 2026))
		clients[i] = &client{number: i, random: random, zipf: rand.NewZipf(random, 1.1, 8, documents-1), db: db}
	}
	// Every connection is opened, and every path walked once or more, before the clock starts.
	warm := time.Now().Add(300 * time.Millisecond)
	each(clients, func(c *client) {
		for first := true; (first || time.Now().Before(warm)) && c.err == nil; first = false {
			c.err = warmUp(op)(ctx, c)
		}
	})
	for _, c := range clients {
		if c.err != nil {
			return nil, fmt.Errorf("first call: %w", c.err)
		}
	}
	return inTurns(clients, turns, seconds, func(c *client, start, end time.Time) {
		step := op.run
		if op.other != nil && c.number == 0 {
			step = op.other
		}
		paced := rate != 0 && (op.other == nil || c.number != 0)
		pace := time.Duration(0)
		if paced {
			pace = time.Duration(count) * time.Second / time.Duration(rate)
		}
		due := start.Add(pace * time.Duration(c.number) / time.Duration(count))
		for now := start; now.Before(end); {
			then := now
			if paced {
				// A request that is sent late has waited since it was due: whoever takes long is not asked less.
				then, due = due, due.Add(pace)
				if !then.Before(end) {
					return
				}
				time.Sleep(time.Until(then))
			}
			err := step(ctx, c)
			if err == errExhausted {
				return
			}
			now = time.Now()
			if err != nil {
				c.errors, c.err = c.errors+1, err
			} else if op.other == nil || c.number != 0 {
				c.latencies, c.last = append(c.latencies, now.Sub(then)), now
			}
		}
	})
}

// inTurns has all clients run, in so many equal parts of the given time, each when the caller says so, and reports after
// each part but the last, whose result it returns.
func inTurns(clients []*client, turns int, seconds float64, run func(c *client, start, end time.Time)) (*result, error) {
	fmt.Println("ready")
	input := bufio.NewReader(os.Stdin)
	length := time.Duration(seconds / float64(turns) * float64(time.Second))
	active, cpu := 0.0, 0.0
	for turn := 1; ; turn++ {
		if _, err := input.ReadString('\n'); err != nil {
			return nil, fmt.Errorf("turn %d: %w", turn, err)
		}
		before, start := ownCPU(), time.Now()
		each(clients, func(c *client) { run(c, start, start.Add(length)) })
		cpu += ownCPU() - before
		// One that does something else may go on for a while: it is not counted.
		last := start
		for _, c := range clients {
			if c.last.After(last) {
				last = c.last
			}
		}
		active += last.Sub(start).Seconds()
		r := summary(clients, active)
		r.DriverCPU = cpu
		if turn == turns {
			return r, nil
		}
		if err := report(r, nil); err != nil {
			return nil, err
		}
	}
}

// warmUp is the operation itself, unless it consumes what was prepared.
func warmUp(op operation) step {
	if op.warm != nil {
		return op.warm
	}
	return op.run
}

// each runs f for all clients at once.
func each(clients []*client, f func(*client)) {
	var group sync.WaitGroup
	for _, c := range clients {
		group.Add(1)
		go func() {
			defer group.Done()
			f(c)
		}()
	}
	group.Wait()
}

func summary(clients []*client, seconds float64) *result {
	r := &result{Seconds: seconds}
	var all []time.Duration
	for _, c := range clients {
		all = append(all, c.latencies...)
		r.Errors += c.errors
		if c.err != nil {
			r.Error = c.err.Error()
		}
	}
	slices.Sort(all)
	r.Ops = len(all)
	if len(all) > 0 {
		at := func(q float64) float64 {
			return float64(all[min(int(q*float64(len(all))), len(all)-1)].Nanoseconds()) / 1000
		}
		r.P50, r.P99, r.P999, r.Max = at(0.5), at(0.99), at(0.999), at(1)
	}
	return r
}

func ownCPU() float64 {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}
