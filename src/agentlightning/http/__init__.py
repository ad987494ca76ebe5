"""The store over HTTP: the route table and the codec, which server and client share."""
