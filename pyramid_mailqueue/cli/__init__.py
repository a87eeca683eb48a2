"""What people call: mq-run.  The only place that ends a process."""
