//! `plyfs man`: the man pages, made from the same definitions as `--help` and docs/config.md.
//!
//! What must hold: each page says which files and variables the command looks at, what its exit status means, and which
//! page comes next.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use super::error::CliError;
use super::{CONFIG_ENV, Cli};
use crate::config::keys::{KEYS, header, plain};
use crate::config::{LOG_FORMAT_ENV, LOG_LEVEL_ENV, place::SYSTEM_FILE};
use crate::format::layout::{CONTROL_SOCKET, MOUNT};

const EXAMPLES: &str = "\
Examples:
  plyfs man /usr/local/share/man

Writes man1/plyfs.1, a page for each command, and man5/plyfs.toml.5.";

const CONFIG_PAGE: &str = "plyfs.toml";

fn files() -> [(String, &'static str); 6] {
    [
        (SYSTEM_FILE.into(), "The configuration of the host, see plyfs.toml(5). Root reads it."),
        ("/var/lib/plyfs".into(), "The store, unless the configuration or --store names another one."),
        (
            format!("<store>/{CONTROL_SOCKET}"),
            "The control socket of the running daemon: HTTP/1.1 with JSON.",
        ),
        (
            format!("<store>/{MOUNT}"),
            "The mount point, unless the configuration or --mount names another one.",
        ),
        ("<mount>/disks/NAME.raw".into(), "A disk, read-write."),
        ("<mount>/bases/NAME.raw".into(), "The virtual disk of a base, read-only."),
    ]
}

/// Of commands, and then of `serve` alone.
const ENVIRONMENT: [(&str, &str); 2] =
    [("PLYFS_STORE", "As --store, which overrides it."), (CONFIG_ENV, "As --config, which overrides it.")];
const SERVE_ENVIRONMENT: [(&str, &str); 5] = [
    (LOG_LEVEL_ENV, "As --log-level, which overrides it."),
    (LOG_FORMAT_ENV, "As --log-format, which overrides it."),
    (
        "https_proxy, http_proxy, all_proxy, no_proxy",
        "Proxies for bases on web servers, and hosts that plyfs asks directly.",
    ),
    ("SSL_CERT_FILE, SSL_CERT_DIR", "Where the system's certificates are, if not in the usual place."),
    (
        "NOTIFY_SOCKET, JOURNAL_STREAM, LISTEN_FDS",
        "Set by systemd. plyfs says when it is ready, gives each line of its log a priority, and takes over a mount that \
         the service manager kept.",
    ),
];

const STATUS: [(&str, &str); 5] = [
    ("0", "Done."),
    ("1", "Failed. One line on standard error says what failed, on which object, why, and what to do."),
    ("2", "Usage: the arguments are wrong."),
    ("130, 143", "SIGINT or SIGTERM ended a command that waited for work."),
    ("78", "The configuration is wrong; EX_CONFIG of sysexits.h. The service is not started again."),
];

/// Write the man pages: one for each command, and plyfs.toml(5)
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Man {
    /// Directory for man1/ and man5/; created when missing
    dir: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> Result<(), CliError> {
        write_all(&self.dir).map_err(|source| CliError::Man { dir: self.dir, source })
    }
}

fn write_all(dir: &Path) -> std::io::Result<()> {
    let (commands, formats) = (dir.join("man1"), dir.join("man5"));
    fs::create_dir_all(&commands)?;
    fs::create_dir_all(&formats)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    write_command(&command, &[], &commands)?;
    fs::write(formats.join(format!("{CONFIG_PAGE}.5")), config_page()?)
}

/// Writes the page of a command and of those below it. `above` are the pages of the commands that it belongs to.
fn write_command(command: &Command, above: &[String], dir: &Path) -> std::io::Result<()> {
    let page = clap_mangen::Man::new(command.clone()).manual("plyfs");
    let file = page.get_filename();
    let name = file.trim_end_matches(".1").to_owned();
    let below: Vec<&Command> = command.get_subcommands().filter(|command| !command.is_hide_set()).collect();

    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        page.render_options_section(&mut text)?;
    }
    if !below.is_empty() {
        page.render_subcommands_section(&mut text)?;
    }
    let help = command.get_after_long_help().or(command.get_after_help());
    examples(&help.map(ToString::to_string).unwrap_or_default()).to_writer(&mut text)?;

    let mut see: Vec<String> = above.to_vec();
    see.extend(
        below.iter().filter_map(|command| command.get_display_name()).map(|name| format!("{name}(1)")),
    );
    see.push(format!("{CONFIG_PAGE}(5)"));
    let serves = ["plyfs", "plyfs-serve", "plyfs-check-config"].contains(&name.as_str());
    let environment = ENVIRONMENT.iter().chain(SERVE_ENVIRONMENT.iter().filter(|_| serves));
    let mut roff = Roff::new();
    terms(&mut roff, "FILES", &files());
    terms(&mut roff, "ENVIRONMENT", environment);
    terms(&mut roff, "EXIT STATUS", &STATUS);
    see_also(&mut roff, &see);
    roff.to_writer(&mut text)?;
    fs::write(dir.join(file), one_preamble(&text))?;

    let above: Vec<String> = above.iter().cloned().chain([format!("{name}(1)")]).collect();
    below.iter().try_for_each(|command| write_command(command, &above, dir))
}

/// The text behind the options: examples as they are typed, and what else is to be said.
fn examples(text: &str) -> Roff {
    let mut roff = Roff::new();
    let (mut notes, mut begun) = (Vec::new(), false);
    for paragraph in text.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
        match paragraph.strip_prefix("Examples:\n") {
            Some(lines) => {
                roff.control("SH", ["EXAMPLES"]).control("nf", []);
                for line in lines.lines() {
                    roff.text([roman(line)]);
                }
                roff.control("fi", []);
            }
            None => notes.push(paragraph),
        }
    }
    for paragraph in notes {
        // It has a section of its own.
        let lines: Vec<&str> = paragraph.lines().filter(|line| !line.starts_with("Exit status:")).collect();
        if lines.is_empty() {
            continue;
        }
        roff.control(if begun { "PP" } else { "SH" }, if begun { vec![] } else { vec!["NOTES"] });
        begun = true;
        roff.text([roman(lines.join("\n"))]);
    }
    roff
}

fn terms<'a, T: AsRef<str> + 'a>(
    roff: &mut Roff,
    title: &str,
    pairs: impl IntoIterator<Item = &'a (T, &'a str)>,
) {
    roff.control("SH", [title]);
    for (term, text) in pairs {
        roff.control("TP", []).text([bold(term.as_ref())]).text([roman(*text)]);
    }
}

fn see_also(roff: &mut Roff, pages: &[String]) {
    roff.control("SH", ["SEE ALSO"]);
    let mut line: Vec<Inline> = Vec::new();
    for page in pages {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        let (name, section) = page.split_once('(').unwrap_or((page, "1)"));
        line.extend([bold(name), roman(format!("({section}"))]);
    }
    roff.text(line);
}

/// The crate begins each piece of a page with the same two lines.
fn one_preamble(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut out = String::new();
    for (number, line) in text.lines().enumerate() {
        if number < 2 || !(line.starts_with(".ie \\n(.g") || line.starts_with(".el .ds Aq")) {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

fn config_page() -> std::io::Result<String> {
    let source = concat!("plyfs ", env!("CARGO_PKG_VERSION"));
    let mut roff = Roff::new();
    roff.control("TH", [CONFIG_PAGE, "5", "", source, "plyfs"]);
    roff.control("SH", ["NAME"]).text([roman(format!("{CONFIG_PAGE} - configuration of plyfs"))]);
    roff.control("SH", ["SYNOPSIS"]).text([italic(SYSTEM_FILE)]);
    roff.control("SH", ["DESCRIPTION"]);
    for paragraph in [
        "The file is TOML. plyfs applies the defaults, then the file, then the flags of plyfs serve: a later value replaces \
         an earlier one. Every command reads the same file to find the store.",
        "An unknown section or key, a value of the wrong type and a value out of bounds are errors that name the key: the \
         daemon does not start, and its exit status is 78. plyfs check-config says whether a file is valid, and what would \
         be used. A change of the file needs a restart of the daemon.",
        "Sizes are integers (bytes) or strings with K, M, G, T, P or E, powers of 1024. Times are whole numbers with ms, s, \
         m, h or d in a string. Paths are absolute.",
    ] {
        roff.control("PP", []).text([roman(paragraph)]);
    }
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            roff.control("SH", [header(section).as_str()]);
        }
        roff.control("TP", []).text([bold(key.name)]);
        roff.text([roman(plain(&key.description()))]);
        let default = plain(&key.default.text());
        if default != "-" {
            roff.control("IP", []).text([roman(format!("Default: {default}."))]);
        }
        if !key.flag.is_empty() {
            roff.control("IP", []).text([roman(format!("Flag: {}.", plain(key.flag)))]);
        }
    }
    roff.control("SH", ["EXAMPLES"]).control("nf", []);
    for line in [
        "[store]",
        "path = \"/srv/vm\"",
        "",
        "[cache]",
        "memory = \"8G\"",
        "",
        "[[http.credentials]]",
        "url = \"https://images.example.org/private/\"",
        "bearer_file = \"/etc/plyfs/secrets/token\"",
    ] {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    terms(&mut roff, "FILES", &files()[..1]);
    see_also(&mut roff, &["plyfs(1)".into(), "plyfs-serve(1)".into(), "plyfs-check-config(1)".into()]);
    let mut text = Vec::new();
    roff.to_writer(&mut text)?;
    Ok(one_preamble(&text))
}
