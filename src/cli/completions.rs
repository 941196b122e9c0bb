//! Files that packages install beside the binary: shell completions and man pages, generated from the definitions of
//! `--help`.

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::json;

use super::error::CliError;
use super::{Cli, Global};

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  plyfs completions bash > /etc/bash_completion.d/plyfs
  plyfs completions zsh > /usr/share/zsh/vendor-completions/_plyfs
  plyfs completions fish > /etc/fish/completions/plyfs.fish";

const MAN_EXAMPLES: &str = "\
Examples:
  plyfs man /usr/local/share/man/man1";

/// Print the completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        // Into a buffer first: clap_complete panics when it cannot write.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "plyfs", &mut script);
        let script = String::from_utf8_lossy(&script).into_owned();
        let value = json!({ "shell": self.shell.to_string(), "script": script });
        global.output().value(&value, |_| script)
    }
}

/// Write the man pages, one per command, into a directory
#[derive(Debug, clap::Args)]
#[command(after_help = MAN_EXAMPLES)]
pub(super) struct Man {
    /// Directory for the pages; created when missing
    dir: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> Result<(), CliError> {
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.dir))
            .map_err(|source| CliError::Man { dir: self.dir, source })
    }
}
