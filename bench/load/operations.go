package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"
)

// documents is how many there are in "docs" (about 150 bytes each) and in "ycsb" (10 fields of 100 bytes).
const documents = 10_000

// inserted and deleted are of this process alone: two of them take turns on one server.
var inserted, deleted = "inserted-" + strconv.Itoa(os.Getpid()), "deleted-" + strconv.Itoa(os.Getpid())

// manyCollections is how many findAnywhere asks.
const manyCollections = 10_000

// bigDocuments is how many of 1 MB there are in "big".
const bigDocuments = 16

var errExhausted = errors.New("nothing is left to delete")

type step func(context.Context, *client) error

// operation is what is measured, and what it needs before and after. other, if set, is what the first client does
// instead, unmeasured. warm replaces run while connections are opened.
type operation struct {
	run     step
	warm    step
	other   step
	prepare func(ctx context.Context, db *mongo.Database, clients int, seconds float64) error
	cleanup func(ctx context.Context, db *mongo.Database) error
}

var operations = map[string]operation{
	"ping":              {run: ping},
	"find":              {run: find},
	"insert":            {run: insert, cleanup: drop(inserted)},
	"insert-array":      {run: insertArray, cleanup: drop(inserted)},
	"update":            {run: update},
	"delete":            {run: remove, warm: ping, prepare: fillForDelete, cleanup: drop(deleted)},
	"findAndModify":     {run: findAndModify},
	"insertMany":        {run: insertMany, cleanup: drop(inserted)},
	"page":              {run: page},
	"count":             {run: count},
	"scan":              {run: scan},
	"sort":              {run: sorted},
	"group":             {run: group},
	"ycsb-a":            {run: ycsb(50)},
	"ycsb-b":            {run: ycsb(95)},
	"ycsb-c":            {run: ycsb(100)},
	"insert-1MB":        {run: insertBig, cleanup: drop(inserted)},
	"find-1MB":          {run: findBig},
	"find-beside":       {run: find, other: slow},
	"find-anywhere":     {run: findAnywhere},
}

func small(id any, random *rand.Rand) bson.D {
	return bson.D{
		{Key: "_id", Value: id}, {Key: "name", Value: "somebody with a name"}, {Key: "age", Value: random.IntN(100)},
		{Key: "group", Value: random.IntN(50)}, {Key: "score", Value: random.Float64()}, {Key: "active", Value: true},
		{Key: "tags", Value: bson.A{"one", "two", "three"}},
	}
}

// record is a document as small makes them, encoded once, but its _id, which is the driver's to add; next makes another
// of it in place. So encoding takes next to nothing of the CPU that generator and server share.
type record struct {
	document bson.Raw
	score    []byte
}

func newRecord(random *rand.Rand) (record, error) {
	document, err := bson.Marshal(small(nil, random)[1:])
	if err != nil {
		return record{}, err
	}
	return record{document: document, score: bson.Raw(document).Lookup("score").Value}, nil
}

// fresh is so many documents that were not inserted before; they last until the next call.
func (c *client) fresh(count int) ([]any, error) {
	for len(c.records) < count {
		r, err := newRecord(c.random)
		if err != nil {
			return nil, err
		}
		c.records = append(c.records, r)
	}
	batch := make([]any, count)
	for i := range batch {
		c.records[i].next(c.random)
		batch[i] = c.records[i].document
	}
	return batch, nil
}

func (r record) next(random *rand.Rand) {
	binary.LittleEndian.PutUint64(r.score, math.Float64bits(random.Float64()))
}

func big(id any) bson.D {
	return bson.D{{Key: "_id", Value: id}, {Key: "text", Value: strings.Repeat("0123456789abcdef", 1<<16)}}
}

var fieldNames = [10]string{"f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9"}

// load makes the collections that are read.
func load(ctx context.Context, db *mongo.Database) error {
	random := rand.New(rand.NewPCG(1, 1))
	if err := db.Drop(ctx); err != nil {
		return err
	}
	wide := func(id int) any {
		document := bson.D{{Key: "_id", Value: id}}
		for _, name := range fieldNames {
			document = append(document, bson.E{Key: name, Value: strings.Repeat(string(rune('a'+id%26)), 100)})
		}
		return document
	}
	for name, make := range map[string]func(int) any{
		"docs": func(id int) any { return small(id, random) }, "ycsb": wide,
	} {
		if err := fill(ctx, db.Collection(name), documents, make); err != nil {
			return err
		}
	}
	for id := range bigDocuments {
		if _, err := db.Collection("big").InsertOne(ctx, big(id)); err != nil {
			return err
		}
	}
	return nil
}

func fill(ctx context.Context, collection *mongo.Collection, count int, make func(int) any) error {
	for first := 0; first < count; first += 1000 {
		var batch []any
		for id := first; id < min(first+1000, count); id++ {
			batch = append(batch, make(id))
		}
		if _, err := collection.InsertMany(ctx, batch); err != nil {
			return err
		}
	}
	return nil
}

func drop(name string) func(context.Context, *mongo.Database) error {
	return func(ctx context.Context, db *mongo.Database) error { return db.Collection(name).Drop(ctx) }
}

func byID(id any) bson.D { return bson.D{{Key: "_id", Value: id}} }

func (c *client) anyID() int { return c.random.IntN(documents) }

func ping(ctx context.Context, c *client) error {
	return c.db.RunCommand(ctx, bson.D{{Key: "ping", Value: 1}}).Err()
}

func find(ctx context.Context, c *client) error {
	return c.db.Collection("docs").FindOne(ctx, byID(c.anyID())).Err()
}

// findAnywhere asks one of the collections c0, c1 and so on of a second database, which bench/growth.py made.
func findAnywhere(ctx context.Context, c *client) error {
	many := c.db.Client().Database(c.db.Name() + "_many")
	err := many.Collection("c"+strconv.Itoa(c.random.IntN(manyCollections))).FindOne(ctx, byID(c.anyID())).Err()
	if errors.Is(err, mongo.ErrNoDocuments) {
		return nil
	}
	return err
}

func insert(ctx context.Context, c *client) error {
	one, err := c.fresh(1)
	if err != nil {
		return err
	}
	_, err = c.db.Collection(inserted).InsertOne(ctx, one[0])
	return err
}

// insertArray has the document in the command instead of a section of its own, as the driver of Node.js.
func insertArray(ctx context.Context, c *client) error {
	one, err := c.fresh(1)
	if err != nil {
		return err
	}
	documents := bson.A{withID(one[0].(bson.Raw))}
	return c.db.RunCommand(ctx, bson.D{{Key: "insert", Value: inserted}, {Key: "documents", Value: documents}}).Err()
}

// withID adds the _id, as drivers do in InsertOne and InsertMany.
func withID(document bson.Raw) bson.Raw {
	const prefix = "\x07_id\x00"
	id := bson.NewObjectID()
	size := len(document) + len(prefix) + len(id)
	whole := binary.LittleEndian.AppendUint32(make([]byte, 0, size), uint32(size))
	whole = append(append(whole, prefix...), id[:]...)
	return append(whole, document[4:]...)
}

func update(ctx context.Context, c *client) error {
	_, err := c.db.Collection("docs").UpdateOne(ctx, byID(c.anyID()),
		bson.D{{Key: "$set", Value: bson.D{{Key: "age", Value: c.random.IntN(100)}}}})
	return err
}

// deletedSize and nextDeleted: the documents that the delete loops share.
var deletedSize int
var nextDeleted atomic.Int64

// fillForDelete inserts more documents than any server here deletes in the given time.
func fillForDelete(ctx context.Context, db *mongo.Database, clients int, seconds float64) error {
	deletedSize = int(min(float64(clients)*4000, 20_000) * seconds)
	random := rand.New(rand.NewPCG(3, 3))
	return fill(ctx, db.Collection(deleted), deletedSize, func(id int) any { return small(id, random) })
}

func remove(ctx context.Context, c *client) error {
	id := int(nextDeleted.Add(1)) - 1
	if id >= deletedSize {
		return errExhausted
	}
	_, err := c.db.Collection(deleted).DeleteOne(ctx, byID(id))
	return err
}

func findAndModify(ctx context.Context, c *client) error {
	return c.db.Collection("docs").FindOneAndUpdate(ctx, byID(c.anyID()),
		bson.D{{Key: "$inc", Value: bson.D{{Key: "age", Value: 1}}}}).Err()
}

func insertMany(ctx context.Context, c *client) error {
	batch, err := c.fresh(100)
	if err != nil {
		return err
	}
	_, err = c.db.Collection(inserted).InsertMany(ctx, batch)
	return err
}

// page reads the next 20 documents, as applications turn pages.
func page(ctx context.Context, c *client) error {
	filter := bson.D{{Key: "_id", Value: bson.D{{Key: "$gte", Value: c.random.IntN(documents - 20)}}}}
	return drain(ctx, c, "docs", filter, options.Find().SetLimit(20), 20)
}

// count counts 20 documents, as drivers do: by an aggregation.
func count(ctx context.Context, c *client) error {
	first := c.random.IntN(documents - 20)
	filter := bson.D{{Key: "_id", Value: bson.D{{Key: "$gte", Value: first}, {Key: "$lt", Value: first + 20}}}}
	number, err := c.db.Collection("docs").CountDocuments(ctx, filter)
	if err == nil && number != 20 {
		err = fmt.Errorf("%d documents were counted instead of 20", number)
	}
	return err
}

// scan reads 1,000 documents in 10 batches.
func scan(ctx context.Context, c *client) error {
	first := c.random.IntN(documents - 1000)
	filter := bson.D{{Key: "_id", Value: bson.D{{Key: "$gte", Value: first}, {Key: "$lt", Value: first + 1000}}}}
	return drain(ctx, c, "docs", filter, options.Find().SetBatchSize(100), 1000)
}

// sorted reads 1,000 documents in 10 batches, in an order that no index has.
func sorted(ctx context.Context, c *client) error {
	return drain(ctx, c, "docs", bson.D{}, options.Find().SetBatchSize(100).SetLimit(1000).
		SetSort(bson.D{{Key: "score", Value: 1}}), 1000)
}

func drain(
	ctx context.Context, c *client, name string, filter any, opts *options.FindOptionsBuilder, expected int,
) error {
	cursor, err := c.db.Collection(name).Find(ctx, filter, opts)
	if err != nil {
		return err
	}
	defer cursor.Close(ctx)
	count := 0
	for cursor.Next(ctx) {
		count++
	}
	if cursor.Err() == nil && count != expected {
		return fmt.Errorf("%d documents instead of %d", count, expected)
	}
	return cursor.Err()
}

func group(ctx context.Context, c *client) error {
	return aggregate(ctx, c, bson.D{{Key: "$group", Value: bson.D{{Key: "_id", Value: "$group"},
		{Key: "mean", Value: bson.D{{Key: "$avg", Value: "$score"}}}}}})
}

// slow is an aggregation of about a second: a million rows.
func slow(ctx context.Context, c *client) error {
	numbers := bson.D{{Key: "$range", Value: bson.A{0, 100}}}
	return aggregate(ctx, c,
		bson.D{{Key: "$project", Value: bson.D{{Key: "n", Value: numbers}}}},
		bson.D{{Key: "$unwind", Value: "$n"}},
		bson.D{{Key: "$group", Value: bson.D{{Key: "_id", Value: "$n"}, {Key: "sum", Value: bson.D{{Key: "$sum", Value: 1}}}}}})
}

func aggregate(ctx context.Context, c *client, stages ...bson.D) error {
	cursor, err := c.db.Collection("docs").Aggregate(ctx, stages)
	if err != nil {
		return err
	}
	var groups []bson.Raw
	return cursor.All(ctx, &groups)
}

// ycsb reads or updates one field of a record of 1 kB; which records are asked for follows a Zipf distribution.
func ycsb(reads int) step {
	return func(ctx context.Context, c *client) error {
		records, filter := c.db.Collection("ycsb"), byID(int(c.zipf.Uint64()))
		if c.random.IntN(100) < reads {
			return records.FindOne(ctx, filter).Err()
		}
		field := bson.D{{Key: fieldNames[c.random.IntN(10)], Value: strings.Repeat("x", 100)}}
		_, err := records.UpdateOne(ctx, filter, bson.D{{Key: "$set", Value: field}})
		return err
	}
}

func insertBig(ctx context.Context, c *client) error {
	_, err := c.db.Collection(inserted).InsertOne(ctx, big(bson.NewObjectID()))
	return err
}

func findBig(ctx context.Context, c *client) error {
	return c.db.Collection("big").FindOne(ctx, byID(c.random.IntN(bigDocuments))).Err()
}
