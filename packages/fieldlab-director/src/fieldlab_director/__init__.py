"""The services that users and executors talk to."""
