//! `plyfs completions`: shell completions, made from the same definitions as `--help`. The shell asks the program for
//! each word, so the names of disks and bases are those of the moment.
//!
//! What must hold: a daemon that is not there, or does not answer, costs the user of the shell no time and no message.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use super::{CONFIG_ENV, Cli, Global};
use crate::config::place;

/// Names the shell that asks for completions of the words behind `--`.
const ASK_ENV: &str = "_PLYFS_COMPLETE";
/// How long a shell waits for names.
const PATIENCE: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Examples:
  plyfs completions bash > /etc/bash_completion.d/plyfs
  plyfs completions zsh > /usr/share/zsh/vendor-completions/_plyfs
  plyfs completions fish > /etc/fish/completions/plyfs.fish";

/// Print the completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let name = self.shell.to_string();
        let mut script = Vec::new();
        if let Some(shell) = Shells::builtins().completer(&name) {
            // Into memory, which does not fail.
            let _ = shell.write_registration(ASK_ENV, "plyfs", "plyfs", "plyfs", &mut script);
        }
        let script = String::from_utf8_lossy(&script).into_owned();
        let value = json!({ "shell": name, "script": script });
        global.output().value(&value, |_| script)
    }
}

/// Answers a shell that asks for completions, if one does; the process is to end then.
pub(super) fn answer() -> bool {
    if std::env::var_os(ASK_ENV).is_none() {
        return false;
    }
    let asked = CompleteEnv::with_factory(command).var(ASK_ENV).bin("plyfs").completer("plyfs");
    // A message would stand in the line that the user types.
    let dir = std::env::current_dir().ok();
    let _ = asked.try_complete(std::env::args_os(), dir.as_deref());
    true
}

/// The commands, with arguments that know the names of this moment.
fn command() -> clap::Command {
    Cli::command()
        .mut_subcommand("disk", |disk| naming(disk, "disks"))
        .mut_subcommand("base", |base| naming(base, "bases"))
        .mut_subcommand("trash", |trash| naming(trash, "trash"))
        .mut_subcommand("trace", |trace| naming(trace, "bases"))
        .mut_subcommand("job", |job| naming(job, "jobs"))
}

/// A command and those below it, whose arguments are names of `kind`.
fn naming(mut command: clap::Command, kind: &'static str) -> clap::Command {
    let below: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    for name in below {
        command = command.mut_subcommand(name, |command| naming(command, kind));
    }
    // What is created has a name that nothing has yet.
    let is_of_disks = kind == "disks";
    let creates =
        ["create", "add"].contains(&command.get_name()) || (is_of_disks && command.get_name() == "import");
    command.mut_args(|arg| {
        let kind = match arg.get_id().as_str() {
            "name" | "names" | "id" | "ids" if !creates => kind,
            "base" => "bases",
            "disk" | "disks" if kind == "trash" => kind,
            // The beginning of DISK@SNAPSHOT.
            "disk" | "from" | "source" if is_of_disks => "disks",
            "disk" => "disks",
            _ => return arg,
        };
        arg.add(ArgValueCompleter::new(move |word: &OsStr| candidates(kind, word)))
    })
}

/// The names that begin with what is typed.
fn candidates(kind: &str, word: &OsStr) -> Vec<CompletionCandidate> {
    let typed = word.to_string_lossy();
    let names = names(kind, std::env::args_os()).unwrap_or_default();
    names.into_iter().filter(|name| name.starts_with(&*typed)).map(CompletionCandidate::new).collect()
}

fn names(kind: &str, words: impl Iterator<Item = OsString>) -> Result<Vec<String>, CliError> {
    let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let named = |flag: &str| -> Option<PathBuf> {
        let at = words.iter().rposition(|word| word == flag || word.starts_with(&format!("{flag}=")))?;
        let value = words[at].split_once('=').map(|(_, value)| value);
        value.or_else(|| words.get(at + 1).map(String::as_str)).map(PathBuf::from)
    };
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let config = named("--config").or_else(|| variable(CONFIG_ENV));
    let store = named("--store").or_else(|| variable("PLYFS_STORE"));
    let client = Client::new(place::store(config.as_deref(), store.as_deref())?)?;
    let objects = client.get_within(PATIENCE, &format!("/v1/{kind}"), "cannot list names")?;
    let key = if kind == "jobs" { "id" } else { "name" };
    let name = |object: &Value| object[key].as_str().map(str::to_owned);
    Ok(objects.as_array().into_iter().flatten().filter_map(name).collect())
}
