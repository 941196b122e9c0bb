//! The command line: one file per noun; every command but `serve`, `worker` and `check` is a client of the control
//! socket.
//!
//! An error is one line on standard error, with `--json` an object. The exit status is 0 for success, 1 for a failure, 2 for a usage error. Text
//! from a server or a user reaches a terminal only with its control characters escaped.

mod announce;
mod args;
mod base;
mod change;
mod check;
mod check_config;
mod client;
mod commit;
mod completions;
mod diff;
mod disk;
mod encryption;
mod ended;
mod error;
mod events;
mod export;
mod generator;
mod glance;
mod holders;
mod import;
mod increment;
mod interrupt;
mod job;
mod journal;
mod limits;
mod listing;
mod logging;
mod man;
mod map;
mod nova;
mod output;
mod pool;
mod progress;
mod retry;
mod seal;
mod serve;
mod snapshot;
mod status;
mod stop;
mod table;
#[cfg(test)]
mod tests;
mod top;
mod trace;
mod trash;
mod upgrade;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::client::Client;
use self::error::CliError;
use self::output::Output;
use crate::config::place;

const EXAMPLES: &str = "\
Examples:
  plyfs serve &                                     start the daemon on the default store
  plyfs base add debian /images/debian-12.raw       register an image; nothing is copied
  plyfs disk create vm1 --base debian --size 20G    create a disk on it, at once
  qemu-system-x86_64 -drive file=\"$(plyfs --json disk show vm1 | jq -r .path)\",format=raw,cache=none
  plyfs status
  plyfs stop

Sizes are bytes, or a number with K, M, G, T, P or E, powers of 1024.
Exit status: 0 done; 1 failed; 2 usage; 78 the configuration is wrong; 130, 143 a signal ended the wait for work.";

/// Layered disk images for hypervisor hosts: many raw disks on one shared base
///
/// Every VM disk is one plain file under one mount. A read returns what the disk itself has written, and the rest from
/// a shared, read-only base image. Ten or a thousand disks share one base without a copy of it.
#[derive(Debug, Parser)]
#[command(name = "plyfs", version, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Names the configuration file, as `--config` does.
const CONFIG_ENV: &str = "PLYFS_CONFIG";

/// The heading of the options that every command has.
const GLOBAL_OPTIONS: &str = "Global options";

#[derive(Debug, clap::Args)]
struct Global {
    /// Directory of the store [default: /var/lib/plyfs for root, else plyfs in the XDG data directory]
    #[arg(long, global = true, value_name = "DIR", env = "PLYFS_STORE", help_heading = GLOBAL_OPTIONS)]
    store: Option<PathBuf>,
    /// TOML file with the configuration [default: /etc/plyfs/plyfs.toml for root, when it exists and is for this store]
    #[arg(long, global = true, value_name = "FILE", env = CONFIG_ENV, help_heading = GLOBAL_OPTIONS)]
    config: Option<PathBuf>,
    /// Print JSON: an object, for `ls` an array of objects, and for long work a line with an object for each update
    #[arg(long, global = true, help_heading = GLOBAL_OPTIONS)]
    json: bool,
}

impl Global {
    /// The store as an absolute path.
    fn store(&self) -> Result<PathBuf, CliError> {
        match &self.store {
            Some(store) => args::absolute(store),
            None => Ok(place::store(self.config.as_deref(), None)?),
        }
    }

    fn client(&self) -> Result<Client, CliError> {
        Client::new(self.store()?)
    }

    fn output(&self) -> Output {
        Output::new(self.json)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    #[command(subcommand)]
    Base(base::Base),
    #[command(subcommand)]
    Disk(disk::Disk),
    #[command(subcommand)]
    Pool(pool::Pool),
    #[command(subcommand)]
    Trash(trash::Trash),
    #[command(subcommand)]
    Trace(trace::Trace),
    #[command(subcommand)]
    Glance(glance::Glance),
    #[command(subcommand)]
    Import(nova::ImportFrom),
    #[command(subcommand)]
    Export(nova::ExportTo),
    #[command(subcommand)]
    Job(job::Job),
    Jobs(job::Jobs),
    Status(status::Status),
    Top(top::Top),
    Events(events::Events),
    Stop(stop::Stop),
    Upgrade(upgrade::Upgrade),
    Check(check::Check),
    CheckConfig(check_config::CheckConfig),
    Completions(completions::Completions),
    Man(man::Man),
    #[command(name = "systemd-generator", hide = true)]
    Generator(generator::Generator),
    /// Serve the mount of the supervisor that started this process
    #[command(hide = true)]
    Worker,
}

/// Parses the arguments of the process, runs the command, and returns its exit status.
pub fn main() -> ExitCode {
    if crate::daemon::is_resuming() {
        return serve::resume();
    }
    if completions::answer() {
        return ExitCode::SUCCESS;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    let Cli { global, command } = cli;
    let json = global.json;
    let result = match command {
        Command::Serve(serve) => serve.run(&global),
        Command::Base(base) => base.run(&global),
        Command::Disk(disk) => disk.run(&global),
        Command::Pool(pool) => pool.run(&global),
        Command::Trash(trash) => trash.run(&global),
        Command::Trace(trace) => trace.run(&global),
        Command::Glance(glance) => glance.run(&global),
        Command::Import(from) => from.run(&global),
        Command::Export(to) => to.run(&global),
        Command::Job(job) => job.run(&global),
        Command::Jobs(jobs) => jobs.run(&global),
        Command::Status(status) => status.run(&global),
        Command::Top(top) => top.run(&global),
        Command::Events(events) => events.run(&global),
        Command::Stop(stop) => stop.run(&global),
        Command::Upgrade(upgrade) => upgrade.run(&global),
        Command::Check(check) => check.run(&global),
        Command::CheckConfig(check) => check.run(&global),
        Command::Generator(generator) => generator.run(&global),
        Command::Completions(completions) => completions.run(&global),
        Command::Man(man) => man.run(),
        Command::Worker => return serve::worker(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failure(&error, json),
    }
}
