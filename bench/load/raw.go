package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"runtime"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
)

const opMsg = 2013

// headerBytes come before a message's document: its header, flags, and the kind of its only section.
const headerBytes = 16 + 4 + 1

// greeter connects and says hello, without the driver's monitoring and pooling. Message and buffer are made once.
type greeter struct {
	address string
	dialer  net.Dialer
	message []byte
	buffer  []byte
}

func newGreeter(uri string) (*greeter, error) {
	target, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	message, err := encode(bson.D{{Key: "hello", Value: 1}, {Key: "$db", Value: "admin"}})
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: 10 * time.Second, KeepAlive: -1}
	return &greeter{address: target.Host, dialer: dialer, message: message, buffer: make([]byte, 64<<10)}, nil
}

func encode(command bson.D) ([]byte, error) {
	body, err := bson.Marshal(command)
	if err != nil {
		return nil, err
	}
	message := binary.LittleEndian.AppendUint32(nil, uint32(headerBytes+len(body)))
	message = binary.LittleEndian.AppendUint32(message, 1)
	message = binary.LittleEndian.AppendUint32(message, 0)
	message = binary.LittleEndian.AppendUint32(message, opMsg)
	return append(append(message, 0, 0, 0, 0, 0), body...), nil
}

// hello opens a connection and exchanges hello on it.
func (g *greeter) hello() (net.Conn, error) {
	connection, err := g.dialer.Dial("tcp", g.address)
	if err != nil {
		return nil, err
	}
	if _, err = g.exchange(connection, g.message); err != nil {
		connection.Close()
		return nil, err
	}
	return connection, nil
}

// exchange sends a message; the reply's document is good until the next one.
func (g *greeter) exchange(connection net.Conn, message []byte) (bson.Raw, error) {
	connection.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := connection.Write(message); err != nil {
		return nil, err
	}
	got, err := io.ReadAtLeast(connection, g.buffer, headerBytes)
	if err != nil {
		return nil, err
	}
	length := int(binary.LittleEndian.Uint32(g.buffer))
	if length < headerBytes || length > len(g.buffer) {
		return nil, fmt.Errorf("a reply of %d bytes", length)
	}
	_, err = io.ReadFull(connection, g.buffer[got:max(got, length)])
	return g.buffer[headerBytes:length], err
}

// idle opens connections that say hello, and at a line has each read a document: a driver opens a connection because it
// has something to ask. Then it prints how many have, and keeps them until its input ends.
func idle(uri, database string, count int) error {
	greeter, err := newGreeter(uri)
	if err != nil {
		return err
	}
	find, err := encode(bson.D{
		{Key: "find", Value: "docs"}, {Key: "filter", Value: byID(0)}, {Key: "limit", Value: 1},
		{Key: "singleBatch", Value: true}, {Key: "$db", Value: database},
	})
	if err != nil {
		return err
	}
	connections := make([]net.Conn, count)
	for i := range connections {
		if connections[i], err = greeter.hello(); err != nil {
			return fmt.Errorf("connection %d of %d: %w", i+1, count, err)
		}
		defer connections[i].Close()
	}
	fmt.Println("ready")
	if _, err = bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	for i, connection := range connections {
		reply, err := greeter.exchange(connection, find)
		if err != nil {
			return fmt.Errorf("connection %d of %d: %w", i+1, count, err)
		}
		if _, err = reply.LookupErr("cursor", "firstBatch", "0", "_id"); err != nil {
			return fmt.Errorf("connection %d of %d: %v in %v", i+1, count, err, reply)
		}
	}
	if err = report(&result{Ops: count}, nil); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// connectStorm counts how often clients can connect, say hello and leave.
func connectStorm(uri string, count, turns int, seconds float64) (*result, error) {
	// Here the generator takes as much CPU as pg_ferret does. Of two threads one would wait for a processor, up to four
	// milliseconds, while the gateway works there, and clients whose replies have come would seem late by that.
	runtime.GOMAXPROCS(1)
	greeters := make([]*greeter, count)
	for i := range greeters {
		var err error
		if greeters[i], err = newGreeter(uri); err != nil {
			return nil, err
		}
	}
	clients := make([]*client, count)
	for i := range clients {
		clients[i] = &client{number: i}
	}
	return inTurns(clients, turns, seconds, func(c *client, start, end time.Time) {
		for now := start; now.Before(end); {
			connection, err := greeters[c.number].hello()
			then := now
			now = time.Now()
			if err != nil {
				c.errors, c.err = c.errors+1, err
				continue
			}
			// A reset instead of TIME_WAIT: the client's ports must last.
			connection.(*net.TCPConn).SetLinger(0)
			connection.Close()
			c.latencies, c.last = append(c.latencies, now.Sub(then)), now
		}
	})
}
