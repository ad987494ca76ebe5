"""What server and client both know: the table of routes, the bodies, the strict reading of JSON."""
