package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
)

const opMsg = 2013

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
	body, err := bson.Marshal(bson.D{{Key: "hello", Value: 1}, {Key: "$db", Value: "admin"}})
	if err != nil {
		return nil, err
	}
	message := binary.LittleEndian.AppendUint32(nil, uint32(16+5+len(body)))
	message = binary.LittleEndian.AppendUint32(message, 1)
	message = binary.LittleEndian.AppendUint32(message, 0)
	message = binary.LittleEndian.AppendUint32(message, opMsg)
	message = append(append(message, 0, 0, 0, 0, 0), body...)
	dialer := net.Dialer{Timeout: 10 * time.Second, KeepAlive: -1}
	return &greeter{address: target.Host, dialer: dialer, message: message, buffer: make([]byte, 64<<10)}, nil
}

// hello opens a connection and exchanges hello on it.
func (g *greeter) hello() (net.Conn, error) {
	connection, err := g.dialer.Dial("tcp", g.address)
	if err != nil {
		return nil, err
	}
	connection.SetDeadline(time.Now().Add(30 * time.Second))
	if err = g.exchange(connection); err != nil {
		connection.Close()
		return nil, err
	}
	return connection, nil
}

func (g *greeter) exchange(connection net.Conn) error {
	if _, err := connection.Write(g.message); err != nil {
		return err
	}
	got, err := io.ReadAtLeast(connection, g.buffer, 16)
	if err != nil {
		return err
	}
	length := int(binary.LittleEndian.Uint32(g.buffer))
	if length < 16 || length > len(g.buffer) {
		return fmt.Errorf("a reply of %d bytes to hello", length)
	}
	_, err = io.ReadFull(connection, g.buffer[got:max(got, length)])
	return err
}

// idle opens connections, says "ready", and keeps them until a line comes.
func idle(uri string, count int) error {
	greeter, err := newGreeter(uri)
	if err != nil {
		return err
	}
	for number := range count {
		connection, err := greeter.hello()
		if err != nil {
			return fmt.Errorf("connection %d: %w", number+1, err)
		}
		defer connection.Close()
	}
	waitForGo()
	return nil
}

// connectStorm counts how often clients can connect, say hello and leave.
func connectStorm(uri string, count int, seconds float64) (*result, error) {
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
	waitForGo()
	before, start := ownCPU(), time.Now()
	end := start.Add(time.Duration(seconds * float64(time.Second)))
	each(clients, func(c *client) {
		for now := time.Now(); now.Before(end); {
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
			c.latencies = append(c.latencies, now.Sub(then))
		}
	})
	r := summary(clients, time.Since(start).Seconds())
	r.DriverCPU = ownCPU() - before
	return r, nil
}
