"""MongoDB's wire protocol as bytes: frames, messages and the little BSON that must be looked at.  No SQL, no I/O."""
