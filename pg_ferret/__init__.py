"""The gateway worker: MongoDB wire protocol in, DocumentDB SQL functions out."""

__version__ = "0.1.0"
