"""What the tests of the library and of the trainer share, and the soak tests with them."""
