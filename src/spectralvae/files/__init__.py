"""Results as files: layouts, writers, and which of many files are done."""
