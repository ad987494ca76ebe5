"""What the store does to rows: each operation loads, lets ``lifecycle`` decide, and writes."""
