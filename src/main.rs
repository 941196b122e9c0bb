//! The `plyfs` command: parse, run, exit code. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    plyfs::cli::main()
}
