//! `plyfs base`: shared, read-only images.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use serde_json::Value;

use super::Global;
use super::args;
use super::client::{Client, read};
use super::error::CliError;
use super::listing::{Listing, Noun};
use super::map;
use super::output::{Column, Kind, printable};
use super::retry::{self, Removal};
use super::table::fields;
use super::trash;
use super::work::{Object, Wait, Work, no_options};
use crate::control::wire::{
    AddBase, Below, Evict, Evicted, Fail, Format, Hydrate, Identity, Pin, SetUrls, WorkKind,
};

const EXAMPLES: &str = "\
Examples:
  plyfs base add debian /images/debian-12.raw
  plyfs base add debian https://images.example.org/debian-12.qcow2
  plyfs base ls
  plyfs base show debian
  plyfs base rm debian";

const ADD_EXAMPLES: &str = "\
Examples:
  plyfs base add debian /images/debian-12.raw
  plyfs base add debian ./debian-12.raw --sha256 \"$(sha256sum < debian-12.raw | cut -d' ' -f1)\"
  plyfs base add debian https://images.example.org/debian-12.qcow2
  plyfs base add debian https://images.example.org/latest --format qcow2 --deadline 10m
  plyfs base add web web.qcow2 --backing https://images.example.org/debian-12.qcow2
  plyfs base add debian https://images.example.org/debian-12.qcow2 --blake3 \"$(b3sum --no-names debian-12.qcow2)\"
  plyfs base add debian glance://glance.example.org:9292/0f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10
  plyfs base add debian --cloud mycloud debian-12
  plyfs base add debian swift://mycloud/images/debian-12.qcow2

A proof that lies beside the image (see plyfs base seal) is used: each group of 16 KiB is proven before a guest gets it. \
A proof that is not that of the image is refused. With --blake3 and no proof, the hash is a digest like --sha256. plyfs never guesses the format. Without --format, an image that is raw by its name and begins as another format does is \
refused; with --format raw it is raw, whatever bytes it contains. The image must not change while it is a base. The \
command prints the path of the base's file in the mount.";

const SEAL_EXAMPLES: &str = "\
Examples:
  plyfs base seal debian-12.qcow2
  plyfs base seal debian-12.raw --out /srv/www/debian-12.raw.obao

The proof has 0.2 % of the size of the image. Publish it beside the image: plyfs base add finds it there. The command \
prints the BLAKE3 hash of the image, as b3sum does. It needs no daemon.";

const LS_EXAMPLES: &str = "\
Examples:
  plyfs base ls
  plyfs base ls --sort cached:desc
  plyfs base ls --filter state=waiting
  plyfs base ls -q --filter disks=0 | xargs -r plyfs base rm
  plyfs --json base ls

On a terminal each line is cut to its width. In a pipe nothing is cut. With --json times are RFC 3339.";

const MAP_EXAMPLES: &str = "\
Examples:
  plyfs base map debian
  plyfs base map debian --cells 4096
  plyfs --json base map debian | jq .total

The command draws cells of equal size. A small letter (a lighter block) means that a cell has some of that kind. Of an image that is not \
raw, each part is where the bytes of the image file are that encode it. It fetches \
nothing. A terminal gets colours unless NO_COLOR is set.";

const RM_EXAMPLES: &str = "\
Examples:
  plyfs base rm debian

The command refuses while a disk still needs the base, in the trash too, and names the disks; plyfs base children lists \
all. It refuses a base whose own file in the mount is open, unless --force is given: those reads then fail. It never \
changes the image itself.";

const HYDRATE_EXAMPLES: &str = "\
Examples:
  plyfs base hydrate debian
  plyfs base hydrate debian --rate 20M
  plyfs base hydrate debian --background
  plyfs --json base hydrate debian | jq .percent

A base in a file of this host can be hydrated too: reads then use the copy in the store. The cache never evicts a \
hydrated base to make room.

The work is a job of the daemon, hydrate-NAME, which continues by itself after the death of a worker and after a restart \
of the daemon. Ctrl-C ends only the command; `plyfs job cancel` ends the job. The command called again waits for the \
same job, and gives it the rate of --rate. With --json each update is a line with the job, and the last line is the \
result. Without a terminal the command is quiet until the end.";

const VERIFY_EXAMPLES: &str = "\
Examples:
  plyfs base verify debian

The work is a job of the daemon, verify-NAME. Ctrl-C cancels it. After the death of a worker the command begins it again. \
It is refused while the base is being hydrated, which compares the base at its end; a hydration that begins ends it.";

const SET_EXAMPLES: &str = "\
Examples:
  plyfs base set debian --source https://images.example.org/debian-12.qcow2
  plyfs base set debian --source-file url.txt --mirror https://mirror.example.org/debian-12.qcow2

The new URL must have the image that was registered: the daemon asks the server first, and refuses a different image. \
Disks stay open, and reads that wait continue there at once. Fetched data stays. A base that was given up is served \
again.";

const EVICT_EXAMPLES: &str = "\
Examples:
  plyfs base evict debian

For a hydrated base the daemon first looks for the original, and refuses when it is gone: the copy in the store may be \
the last one. With --force it is dropped.";

const PIN_EXAMPLES: &str = "\
Examples:
  plyfs base pin debian
  plyfs base pin debian --copies 2
  plyfs base pin debian --off

With --copies, the daemon keeps further copies of the base's fetched data in pools, which lie on other drives. When the \
drive of the store does not deliver a block, readers get it from a copy, also when the base's server is gone. `plyfs \
base show` tells how far the copies are. For copies of all of the base, hydrate it.";

const FAIL_EXAMPLES: &str = "\
Examples:
  plyfs base fail debian
  plyfs base fail debian --undo

For a base whose server is gone for good: reads that wait for it end with an I/O error at once, and so do later ones. \
Reads of data in the store succeed as before. The command holds after a restart, until --undo or until `plyfs base \
set` gives another URL.";

pub(super) const COLUMNS: [Column; 8] = [
    ("NAME", "name", Kind::Text),
    ("FORMAT", "format", Kind::Text),
    ("SIZE", "size", Kind::Size),
    ("DISKS", "disks", Kind::Number),
    ("CACHED", "cached_bytes", Kind::Size),
    ("STATE", "state", Kind::Text),
    ("SINCE", "state_since", Kind::Time),
    ("SOURCE", "source", Kind::Text),
];

pub(super) const FIELDS: [Column; 29] = [
    ("name", "name", Kind::Text),
    ("id", "id", Kind::Text),
    ("path", "path", Kind::Text),
    ("source", "source", Kind::Text),
    ("format", "format", Kind::Text),
    ("size", "size", Kind::Size),
    ("disks", "disks", Kind::Number),
    ("in trash", "trashed_disks", Kind::Number),
    ("trash holds", "trashed_bytes", Kind::Size),
    ("last used", "last_used", Kind::Time),
    ("cached", "cached_bytes", Kind::Size),
    ("percent", "cached_percent", Kind::Text),
    ("in memory", "memory_bytes", Kind::Size),
    ("pinned", "pinned", Kind::Text),
    ("copies", "copies", Kind::Number),
    ("further copies", "further_copies", Kind::Text),
    ("complete", "complete", Kind::Text),
    ("verified", "digest_verified", Kind::Text),
    ("sha256", "sha256", Kind::Text),
    ("blake3", "blake3", Kind::Text),
    ("proof", "proof", Kind::Text),
    ("created", "created", Kind::Time),
    ("state", "state", Kind::Text),
    ("since", "state_since", Kind::Time),
    ("error", "error", Kind::Text),
    ("examined", "examined", Kind::Time),
    ("failing since", "failing_since", Kind::Time),
    ("waiting since", "waiting_since", Kind::Time),
    ("waiting for", "waiting_for", Kind::Text),
];

const NOUN: Noun = Noun {
    names: ["base", "bases"],
    name: "name",
    columns: &COLUMNS,
    more: &FIELDS,
    totals: &[
        ("size", Kind::Size, "{} in all"),
        ("cached_bytes", Kind::Size, "{} cached"),
        ("disks", Kind::Number, "disks: {}"),
    ],
    notes: troubles,
};

/// Register, list and remove bases: the shared, read-only images that disks start from
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
#[expect(clippy::large_enum_variant, reason = "a process has one of them")]
pub(super) enum Base {
    /// Register an image as a base; returns at once, nothing is copied or converted
    #[command(after_help = ADD_EXAMPLES)]
    Add {
        /// Name of the new base
        #[arg(value_parser = args::new_name)]
        name: String,
        /// Path or URL of the image: https, s3, swift, glance, nbd, nbd+unix or oci; or a block device
        #[arg(required_unless_present = "source_file")]
        source: Option<String>,
        /// Read the path or URL from the first line of a file, to hide it from other users, who see command lines
        #[arg(long, value_name = "FILE", conflicts_with = "source")]
        source_file: Option<PathBuf>,
        /// SOURCE is the name or the ID of an image of this cloud of clouds.yaml, which [[http.clouds]] names
        #[arg(long, value_name = "CLOUD", conflicts_with = "source_file")]
        cloud: Option<String>,
        /// Fetch all of the image once, in the background, and read it from the store: for an image of a Glance whose store
        /// has no ranges
        #[arg(long)]
        download: bool,
        /// Format of the image [default: as the image's record says, or qcow2 or vmdk when the name ends in .qcow2 or .vmdk, else raw]
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// Another URL of the same content; may be given more than once
        #[arg(long = "mirror", value_name = "URL")]
        mirrors: Vec<String>,
        /// Path or URL of the image below this one; may be given more than once, the nearest first
        #[arg(long = "backing", value_name = "SOURCE")]
        backing: Vec<String>,
        /// A registered base whose images lie below that, with its options for servers
        #[arg(long, value_name = "BASE", value_parser = args::name)]
        onto: Option<String>,
        /// Which validators of a server's answer must still match: `strong` (ETag, or Last-Modified), `weak` (a weak
        /// ETag is enough), `size`
        #[arg(long, value_enum, default_value = "strong")]
        identity: IdentityArg,
        /// How long a read waits for a server that is down, such as 30s [default: until the server is back]
        #[arg(long, value_name = "TIME", value_parser = args::seconds)]
        deadline: Option<u32>,
        /// Most requests to its servers at a time
        #[arg(long, value_name = "N")]
        max_requests: Option<u32>,
        /// Most bytes per second from its servers
        #[arg(long, value_name = "SIZE", value_parser = args::size)]
        max_rate: Option<u64>,
        /// Never evict its fetched data to make room
        #[arg(long)]
        pin: bool,
        /// Digest that the image file must have
        #[arg(long, value_name = "HEX", value_parser = args::sha256, conflicts_with = "sha512")]
        sha256: Option<String>,
        /// Digest that the image file must have
        #[arg(long, value_name = "HEX", value_parser = args::sha512)]
        sha512: Option<String>,
        /// BLAKE3 hash that the image file must have, as b3sum prints it
        #[arg(long, value_name = "HEX", value_parser = args::sha256)]
        blake3: Option<String>,
        /// Path or URL of the proof of the image [default: beside the image, with .obao behind its name]
        #[arg(long, value_name = "SOURCE", conflicts_with = "no_proof")]
        proof: Option<String>,
        /// Use no proof, although one is beside the image
        #[arg(long)]
        no_proof: bool,
    },
    /// Make the proof of an image file, offline: with it beside the image, no byte reaches a guest unproven
    #[command(after_help = SEAL_EXAMPLES)]
    Seal {
        /// The image file
        image: PathBuf,
        /// Where the proof is written [default: beside the image, with .obao behind its name]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// List the bases
    #[command(visible_alias = "list", after_help = LS_EXAMPLES)]
    Ls(Listing),
    /// Show one base
    #[command(after_help = "Examples:\n  plyfs base show debian\n  plyfs --json base show debian")]
    Show {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Show where the bytes of a base are: the cache, a file of this host, or its server
    #[command(after_help = MAP_EXAMPLES)]
    Map {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// The most cells [default: as many as fit]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
        cells: Option<u32>,
    },
    #[command(subcommand)]
    Trace(super::trace::BaseTrace),
    /// Fetch all of a base into the store; once it is complete and its digest matches, reads need no server
    #[command(after_help = HYDRATE_EXAMPLES)]
    Hydrate {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// Most bytes per second, also of a hydration that is under way
        #[arg(long, value_name = "SIZE", value_parser = args::size)]
        rate: Option<u64>,
        /// Return at once; `plyfs jobs` shows the progress
        #[arg(long)]
        background: bool,
    },
    /// Read the data of a base that is in the store, and compare it with its checksums and its digest
    #[command(after_help = VERIFY_EXAMPLES)]
    Verify {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Give another URL of the same image, while disks are open
    #[command(after_help = SET_EXAMPLES)]
    Set {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// The new URL
        #[arg(long, value_name = "URL", required_unless_present = "source_file")]
        source: Option<String>,
        /// Read the URL from the first line of a file, to hide it from other users, who see command lines
        #[arg(long, value_name = "FILE", conflicts_with = "source")]
        source_file: Option<PathBuf>,
        /// Another URL of the same content, in place of all mirrors; may be given more than once
        #[arg(long = "mirror", value_name = "URL")]
        mirrors: Vec<String>,
        /// Which file of the base: 0 is the image, 1 the file below it
        #[arg(long, value_name = "N", default_value_t = 0)]
        file: u8,
    },
    /// Give up a base whose server is gone for good: reads that wait for it end with an error
    #[command(after_help = FAIL_EXAMPLES)]
    Fail {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// Undo it: ask the server again
        #[arg(long)]
        undo: bool,
    },
    /// Drop the fetched data of a base; a later read fetches it again
    #[command(after_help = EVICT_EXAMPLES)]
    Evict {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// Also drop the last copy of an image whose original is gone
        #[arg(long)]
        force: bool,
    },
    /// Keep the fetched data of a base when other bases need room
    #[command(after_help = PIN_EXAMPLES)]
    Pin {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// Copies of its data, the one in the store included; each other one lies in another pool
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8), conflicts_with = "off")]
        copies: Option<u8>,
        /// Unpin the base, and drop its further copies
        #[arg(long)]
        off: bool,
    },
    /// Remove bases that no disk needs
    #[command(after_help = RM_EXAMPLES)]
    Rm {
        /// Names of the bases
        #[arg(required = true, value_name = "NAME", value_parser = args::name)]
        names: Vec<String>,
        /// Also remove bases whose own file in the mount is open
        #[arg(long)]
        force: bool,
    },
    /// List what stands on a base: disks, snapshots, and disks in the trash
    #[command(after_help = trash::BASE_CHILDREN_EXAMPLES)]
    Children {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Remove the bases that nothing needs
    #[command(after_help = trash::PRUNE_EXAMPLES)]
    Prune {
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Only bases that nothing has needed for this long, such as 30d
        #[arg(long, value_name = "TIME", value_parser = args::time)]
        older_than: Option<Duration>,
    },
}

/// The format of an image file.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum FormatArg {
    Raw,
    Qcow2,
    Vmdk,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => Self::Raw,
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Vmdk => Self::Vmdk,
        }
    }
}

/// Which validators of a server's answer must still match.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum IdentityArg {
    Strong,
    Weak,
    Size,
}

impl From<IdentityArg> for Identity {
    fn from(identity: IdentityArg) -> Self {
        match identity {
            IdentityArg::Strong => Self::Strong,
            IdentityArg::Weak => Self::Weak,
            IdentityArg::Size => Self::Size,
        }
    }
}

/// The first line of a file: a path or a URL.
fn first_line(path: &Path) -> Result<String, CliError> {
    let fail = |source| CliError::File { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(fail)?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

impl Base {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Add {
                name,
                source,
                source_file,
                cloud,
                download,
                format,
                mirrors,
                backing,
                onto,
                identity,
                deadline,
                max_requests,
                max_rate,
                pin,
                sha256,
                sha512,
                blake3,
                proof,
                no_proof,
            } => {
                let source = match source_file {
                    Some(path) => first_line(&path)?,
                    None => source.unwrap_or_default(),
                };
                let below = |source| Ok(Below { source: absolute_source(source)?, format: None });
                let backing = backing.into_iter().map(below).collect::<Result<Vec<_>, CliError>>()?;
                let action = format!("cannot add base {name}");
                let source = match cloud {
                    Some(cloud) => image_of(&cloud, &source)?,
                    None => absolute_source(source)?,
                };
                let body = AddBase {
                    name,
                    source,
                    mirrors,
                    format: format.map(Format::from),
                    backing,
                    onto,
                    sha256,
                    sha512,
                    blake3,
                    proof: proof.map(absolute_source).transpose()?,
                    no_proof,
                    identity: Some(identity.into()),
                    deadline_seconds: deadline,
                    max_requests,
                    max_rate,
                    pinned: pin,
                    download,
                };
                let base = retry::create(&global.client()?, "/v1/bases", &body, &action)?;
                global.output().value(&base, super::disk::paths)
            }
            Self::Seal { image, out } => super::seal::run(global, &image, out),
            Self::Ls(listing) => {
                listing.check(&NOUN)?;
                let bases = global.client()?.get("/v1/bases", "cannot list bases")?;
                listing.run(&global.output(), bases, &NOUN)
            }
            Self::Show { name } => {
                let base = global
                    .client()?
                    .get(&format!("/v1/bases/{name}"), &format!("cannot show base {name}"))?;
                global.output().value(&base, |base| fields(&with_copies(base), &FIELDS))
            }
            Self::Map { name, cells } => map::show(global, "base", &name, cells),
            Self::Trace(trace) => trace.run(global),
            Self::Hydrate { name, rate, background } => {
                let wait = if background { Wait::No } else { Wait::UntilEnd };
                Work { object: Object::Base(&name), kind: WorkKind::Hydrate, body: Hydrate { rate } }
                    .run(global, wait)
            }
            Self::Verify { name } => {
                let verify = Work { object: Object::Base(&name), kind: WorkKind::Verify, body: no_options() };
                verify.run(global, Wait::UntilEnd)
            }
            Self::Set { name, source, source_file, mirrors, file } => {
                let source = match source_file {
                    Some(path) => first_line(&path)?,
                    None => source.unwrap_or_default(),
                };
                let mirrors = if mirrors.is_empty() { None } else { Some(mirrors) };
                let body = SetUrls { source, mirrors, file };
                let action = format!("cannot set the URL of base {name}");
                let base = retry::repeat(|| {
                    global.client()?.post(&format!("/v1/bases/{name}/set"), &body, &action)
                })?;
                global.output().value(&base, |_| String::new())
            }
            Self::Fail { name, undo } => {
                let verb = if undo { "resume" } else { "give up" };
                let action = format!("cannot {verb} base {name}");
                let body = Fail { given_up: !undo };
                let base = retry::repeat(|| {
                    global.client()?.post(&format!("/v1/bases/{name}/fail"), &body, &action)
                })?;
                global.output().value(&base, |_| String::new())
            }
            Self::Evict { name, force } => {
                let action = format!("cannot evict base {name}");
                let done = retry::repeat(|| {
                    let client = global.client()?;
                    let path = format!("/v1/bases/{name}/evict");
                    // Without a body for a daemon of an earlier version.
                    if force {
                        client.post(&path, &Evict { force }, &action)
                    } else {
                        client.post_empty(&path, &action)
                    }
                })?;
                let Evicted { evicted_bytes, .. } = read(&done, &action)?;
                global.output().value(&done, |_| {
                    format!("{name}: {} dropped\n", crate::config::size::format_size(evicted_bytes))
                })
            }
            Self::Pin { name, copies, off } => {
                let action = format!("cannot pin base {name}");
                let body = Pin { pinned: !off, copies };
                let base = retry::repeat(|| {
                    global.client()?.post(&format!("/v1/bases/{name}/pin"), &body, &action)
                })?;
                global.output().value(&base, |_| String::new())
            }
            Self::Rm { names, force } => {
                super::disk::remove_each(global, &names, |client, name| remove_base(client, name, force))
            }
            Self::Children { name } => trash::children_of_base(global, &name),
            Self::Prune { dry_run, older_than } => trash::prune(global, dry_run, older_than),
        }
    }
}

/// Removes a base. When the daemon refuses because a client has its file open, the error names the processes.
fn remove_base(client: &Client, name: &str, force: bool) -> Result<Value, CliError> {
    const REMEDY: &str = "close it there, or repeat with --force: its reads then fail";
    let removal = |force| Removal { force, ..Removal::default() };
    retry::remove(client, "base", name, removal(force)).or_else(|error| {
        // A base that disks need is refused with their names.
        if !error.to_string().contains("its file open") {
            return Err(error);
        }
        match super::disk::naming_holders(client, ("base", name), error, REMEDY) {
            Some(error) => Err(error),
            None => retry::remove(client, "base", name, removal(true)),
        }
    })
}

/// The base with its copies as text.
fn with_copies(base: &Value) -> Value {
    let mut base = base.clone();
    let copies = base["further_copies"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |copy: &Value| {
        let bytes = crate::config::size::format_size(copy["bytes"].as_u64().unwrap_or(0));
        let state = match (copy["error"].as_str(), copy["current"].as_bool()) {
            (Some(error), _) => error,
            (None, Some(true)) => "current",
            (None, _) => "being copied",
        };
        format!("{}: {bytes}, {state}", copy["pool"].as_str().unwrap_or_default())
    };
    base["further_copies"] = copies.iter().map(text).collect::<Vec<_>>().join("; ").into();
    base
}

/// A line for each base whose readers wait or get errors: its state, since when, and the last error.
fn troubles(bases: &[Value]) -> String {
    let mut out = String::new();
    for base in bases {
        let text = |key: &str| base[key].as_str().map(printable);
        let Some(why) = text("error").or_else(|| text("waiting_for")) else { continue };
        let since = text("state_since").map_or_else(String::new, |since| format!(" since {since}"));
        let (name, state) = (text("name").unwrap_or_default(), text("state").unwrap_or_default());
        let separator = if out.is_empty() { "\n" } else { "" };
        out.push_str(&format!("{separator}{name}: {state}{since}: {why}\n"));
    }
    out
}

/// The URL of an image of a cloud. The daemon finds the image, and checks the name of the cloud.
fn image_of(cloud: &str, image: &str) -> Result<String, CliError> {
    if args::is_url(image) {
        let why = format!("{image}: with --cloud give the name or the ID of an image, not a URL");
        return Err(CliError::Usage(why));
    }
    let mut url = format!("glance+cloud://{cloud}/");
    for byte in image.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => url.push(byte.into()),
            _ => url.push_str(&format!("%{byte:02X}")),
        }
    }
    Ok(url)
}

/// Makes a path absolute, because the daemon has another current directory. A URL stays as it is.
fn absolute_source(source: String) -> Result<String, CliError> {
    if args::is_url(&source) {
        return Ok(source);
    }
    let path = args::absolute(Path::new(&source))?;
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(CliError::NotUtf8 { path }),
    }
}
