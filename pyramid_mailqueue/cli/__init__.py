"""The commands mq-run, mq-queue and mq-send-test.  The only place that ends a process."""
