"""The hash index: ids to rows, insertion, admission, growth."""
