"""A Hub on the loopback interface, and the tests that push to it."""
