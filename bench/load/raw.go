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

// hello opens a connection and exchanges hello on it, without the driver's own monitoring and pooling.
func hello(address string) (net.Conn, error) {
	body, err := bson.Marshal(bson.D{{Key: "hello", Value: 1}, {Key: "$db", Value: "admin"}})
	if err != nil {
		return nil, err
	}
	message := binary.LittleEndian.AppendUint32(nil, uint32(16+5+len(body)))
	message = binary.LittleEndian.AppendUint32(message, 1)
	message = binary.LittleEndian.AppendUint32(message, 0)
	message = binary.LittleEndian.AppendUint32(message, opMsg)
	message = append(append(message, 0, 0, 0, 0, 0), body...)
	connection, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	connection.SetDeadline(time.Now().Add(30 * time.Second))
	if err = exchange(connection, message); err != nil {
		connection.Close()
		return nil, err
	}
	return connection, nil
}

func exchange(connection net.Conn, message []byte) error {
	if _, err := connection.Write(message); err != nil {
		return err
	}
	var header [16]byte
	if _, err := io.ReadFull(connection, header[:]); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, connection, int64(binary.LittleEndian.Uint32(header[:]))-16)
	return err
}

// idle opens connections, says "ready", and keeps them until a line comes.
func idle(uri string, count int) error {
	target, err := url.Parse(uri)
	if err != nil {
		return err
	}
	for number := range count {
		connection, err := hello(target.Host)
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
	target, err := url.Parse(uri)
	if err != nil {
		return nil, err
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
			connection, err := hello(target.Host)
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
