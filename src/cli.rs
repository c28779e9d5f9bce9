//! The command line: parses arguments and hands them to the parts that do the work.
