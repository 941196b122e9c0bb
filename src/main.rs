//! The `plyfs` command. The library has all of its code.

use std::process::ExitCode;

fn main() -> ExitCode {
    plyfs::cli::main()
}
