//! One pass over the images of clouds.
//!
//! What must hold:
//! - What goes wrong with one image ends the work on that image alone. Only a daemon that is gone ends the pass.
//! - A link is made only after the bytes of the disk were looked at, and the base has been told that it is used.
//! - A base is removed only after a complete list that does not have its image, under Nova's lock, when no overlay and no
//!   disk stands on it. The daemon refuses while its file is open.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use super::{Outcome, Report, SyncImages};
use crate::cli::client::{Client, read};
use crate::cli::ended::Outcomes;
use crate::cli::error::CliError;
use crate::cli::retry::{self, Removal};
use crate::control::wire::{AddBase, Base, BaseState, CloudImage, ErrorKind, Status};
use crate::nova::{Entry, Instances, NameLock, Overlay, cache_name, contents};
use crate::source::http::NO_RANGES;

/// How long Nova may hold the lock of an image: it holds it for a download.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the first bytes of a disk may take.
const FIRST_BYTES: Duration = Duration::from_secs(60);
/// What the names of these bases begin with; the ID follows.
const PREFIX: &str = "g-";
/// What the source of a base of a cloud begins with; `CLOUD/ID` follows.
const SCHEME: &str = "glance+cloud://";

/// What becomes of an image, and why.
type Done = (Outcome, Option<String>);

impl Outcomes for Outcome {
    const FAILED: Self = Self::Failed;
}

/// Why the work on an image ends.
type Ended = crate::cli::ended::Ended<Outcome>;

pub(super) struct Pass<'a> {
    client: &'a Client,
    options: &'a SyncImages,
    instances: Instances,
    mount: PathBuf,
    bases: HashMap<String, Base>,
    /// Clouds whose list is complete, and their images.
    listed: HashMap<String, HashSet<String>>,
    reports: Vec<Report>,
}

fn base_name(image: &str) -> String {
    format!("{PREFIX}{image}")
}

impl<'a> Pass<'a> {
    pub(super) fn new(client: &'a Client, options: &'a SyncImages) -> Result<Self, CliError> {
        let instances = Instances::open(&options.instances).map_err(|source| {
            let why = format!("cannot use Nova's directory of instances: {source}; name it with --instances");
            CliError::Failed(why)
        })?;
        let action = "cannot sync images";
        let status: Status = read(&client.get("/v1/status", action)?, action)?;
        let bases: Vec<Base> = read(&client.get("/v1/bases", action)?, action)?;
        let bases = bases.into_iter().map(|base| (base.name.clone(), base)).collect();
        let (mount, listed) = (PathBuf::from(status.mount), HashMap::new());
        Ok(Self { client, options, instances, mount, bases, listed, reports: Vec::new() })
    }

    pub(super) fn run(mut self, clouds: &[String]) -> Result<Vec<Report>, CliError> {
        for cloud in clouds {
            let listed = self.list(cloud);
            let Some(images) = self.note(cloud, None, listed)? else { continue };
            self.listed.insert(cloud.clone(), images.iter().map(|image| image.id.clone()).collect());
            for image in images {
                let done = self.offer(&image);
                if let Some((result, why)) = self.note(cloud, Some(&image), done)? {
                    self.report(cloud, Some(&image), result, why);
                }
            }
        }
        self.remove_gone()?;
        Ok(self.reports)
    }

    /// The value, or none after a report.
    fn note<T>(
        &mut self,
        cloud: &str,
        image: Option<&CloudImage>,
        done: Result<T, Ended>,
    ) -> Result<Option<T>, CliError> {
        match done {
            Ok(value) => Ok(Some(value)),
            Err(Ended::With(result, why)) => {
                self.report(cloud, image, result, Some(why));
                Ok(None)
            }
            Err(Ended::Command(error)) => Err(error),
        }
    }

    fn report(&mut self, cloud: &str, image: Option<&CloudImage>, result: Outcome, why: Option<String>) {
        let (id, name) = (image.map(|image| image.id.clone()), image.and_then(|image| image.name.clone()));
        self.reports.push(Report { cloud: cloud.to_owned(), image: id, name, result, why });
    }

    fn list(&self, cloud: &str) -> Result<Vec<CloudImage>, Ended> {
        let action = format!("cannot list the images of cloud {cloud}");
        let listed = self.client.get(&format!("/v1/clouds/{cloud}/images"), &action)?;
        Ok(read(&listed, &action)?)
    }

    fn file_of(&self, image: &str) -> PathBuf {
        self.mount.join("bases").join(format!("{}.raw", base_name(image)))
    }

    /// Makes an active image a base with a link.
    fn offer(&mut self, image: &CloudImage) -> Result<Done, Ended> {
        if let Some(why) = &image.unusable {
            return Ok((Outcome::Skipped, Some(why.clone())));
        }
        let target = self.file_of(&image.id);
        let found = self.instances.entry(&image.id)?;
        if found == Entry::File {
            return Ok((Outcome::Skipped, Some("Nova has a file of its own".to_owned())));
        }
        let is_linked = found == Entry::Link(target.clone());
        if !self.bases.contains_key(&base_name(&image.id)) {
            if self.options.dry_run {
                return Ok((Outcome::Linked, None));
            }
            self.add(image)?;
        }
        let base = &self.bases[&base_name(&image.id)];
        if base.source != image.source {
            let why = format!("base {} is of {}; rename or remove it", base.name, base.source);
            return Ok((Outcome::Failed, Some(why)));
        }
        if !matches!(base.state, BaseState::Ok | BaseState::Waiting | BaseState::Failing) {
            let why = base.error.clone().unwrap_or_else(|| "its state is not ok".to_owned());
            return Ok((Outcome::Failed, Some(format!("base {}: {why}", base.name))));
        }
        match (is_linked, self.options.dry_run) {
            (true, _) => Ok((Outcome::Present, None)),
            (false, true) => Ok((Outcome::Linked, None)),
            (false, false) => self.link(image, &target),
        }
    }

    fn add(&mut self, image: &CloudImage) -> Result<(), Ended> {
        let name = base_name(&image.id);
        let action = format!("cannot add base {name}");
        let body = AddBase { name: name.clone(), source: image.source.clone(), ..AddBase::default() };
        let added = match retry::create(self.client, "/v1/bases", &body, &action) {
            // Another pass was quicker.
            Err(error) if error.is(ErrorKind::Exists) => {
                self.client.get(&format!("/v1/bases/{name}"), &action)?
            }
            Err(CliError::Refused { message, .. }) if message.contains(NO_RANGES) => {
                return Err(Ended::With(Outcome::Skipped, message));
            }
            added => added?,
        };
        self.bases.insert(name, read(&added, &action)?);
        Ok(())
    }

    fn link(&self, image: &CloudImage, target: &Path) -> Result<Done, Ended> {
        let head = head_of(target).map_err(|why| Ended::With(Outcome::Failed, why))?;
        let disk_format = image.disk_format.as_deref().unwrap_or_default();
        if let Some(why) = contents::refusal(disk_format, &head) {
            return Ok((Outcome::Failed, Some(format!("{why}; Nova would refuse it, so it is not linked"))));
        }
        let lock = self.lock(&image.id)?;
        // The manager of Nova's cache removes what was not used for long.
        File::open(target).and_then(|file| file.set_modified(SystemTime::now()))?;
        match self.instances.link(&lock, &image.id, target)? {
            Entry::Link(found) if found == target => Ok((Outcome::Linked, None)),
            Entry::Link(_) => Ok((Outcome::Skipped, Some("its entry is a link to another file".to_owned()))),
            Entry::File | Entry::Absent => {
                Ok((Outcome::Skipped, Some("Nova has a file of its own".to_owned())))
            }
        }
    }

    fn lock(&self, image: &str) -> Result<NameLock, Ended> {
        let held = || Ended::With(Outcome::Busy, "Nova holds the lock of the image".to_owned());
        self.instances.lock(image, PATIENCE)?.ok_or_else(held)
    }

    fn overlays(&self) -> Result<Vec<Overlay>, Ended> {
        Ok(self.instances.overlays(&self.mount)?)
    }

    /// Removes the bases and links of images that complete lists do not have.
    fn remove_gone(&mut self) -> Result<(), CliError> {
        let mut gone: Vec<(String, CloudImage)> = Vec::new();
        for base in self.bases.values() {
            let of = base.source.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/'));
            let Some((cloud, id)) = of.filter(|(_, id)| base.name == base_name(id)) else { continue };
            if self.listed.get(cloud).is_some_and(|images| !images.contains(id)) {
                gone.push((cloud.to_owned(), CloudImage { id: id.to_owned(), ..CloudImage::default() }));
            }
        }
        gone.sort_by(|a, b| a.1.id.cmp(&b.1.id));
        for (cloud, image) in &gone {
            let done = self.remove(&image.id);
            if let Some((result, why)) = self.note(cloud, Some(image), done)? {
                self.report(cloud, Some(image), result, why);
            }
        }
        let strays = self.remove_strays();
        self.note("-", None, strays).map(drop)
    }

    fn remove(&self, image: &str) -> Result<Done, Ended> {
        let (name, target) = (base_name(image), self.file_of(image));
        let base = &self.bases[&name];
        let kept = |why: &str| Ok((Outcome::Kept, Some(why.to_owned())));
        if base.disks > 0 {
            return kept("disks need it");
        }
        let used = base.last_used.as_deref().and_then(|at| humantime::parse_rfc3339(at).ok());
        let age = used.and_then(|at| at.elapsed().ok()).unwrap_or_default();
        if age < self.options.keep_unused {
            return kept("it was used a short time ago");
        }
        let needed = |overlays: Vec<Overlay>| {
            let above = overlays.into_iter().find(|overlay| overlay.stands_on(image, &target));
            above.map(|overlay| format!("{} stands on it", overlay.path.display()))
        };
        if let Some(why) = needed(self.overlays()?) {
            return kept(&why);
        }
        if self.options.dry_run {
            return Ok((Outcome::Removed, None));
        }
        let lock = self.lock(image)?;
        // Nova makes overlays under this lock.
        if let Some(why) = needed(self.overlays()?) {
            return kept(&why);
        }
        match retry::remove(self.client, "base", &name, Removal::default()) {
            Err(error) if error.is(ErrorKind::InUse) || error.is(ErrorKind::MayBeInUse) => {
                return kept(&error.to_string());
            }
            removed => removed?,
        };
        self.instances.unlink(&lock, image, &target)?;
        Ok((Outcome::Removed, None))
    }

    /// Removes links to bases that are gone: Nova takes the image for missing, and may write there.
    fn remove_strays(&self) -> Result<(), Ended> {
        if self.options.dry_run {
            return Ok(());
        }
        for (entry, target) in self.instances.links(&self.mount.join("bases"))? {
            let base = target.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(image) = base.strip_prefix(PREFIX).filter(|image| cache_name(image) == entry) else {
                continue;
            };
            let action = format!("cannot show base {base}");
            match self.client.get(&format!("/v1/bases/{base}"), &action) {
                Err(error) if error.is(ErrorKind::NotFound) => {
                    let lock = self.lock(image)?;
                    self.instances.unlink(&lock, image, &target)?;
                }
                found => drop(found?),
            }
        }
        Ok(())
    }
}

/// The first bytes of a file of a base, which may wait for a server.
fn head_of(path: &Path) -> Result<Vec<u8>, String> {
    let fail = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let (send, receive) = mpsc::channel();
    let opened = path.to_owned();
    let reading = move || {
        let mut head = Vec::new();
        let done =
            File::open(&opened).and_then(|file| file.take(contents::HEAD as u64).read_to_end(&mut head));
        let _ = send.send(done.map(|_| head));
    };
    std::thread::Builder::new().spawn(reading).map_err(fail)?;
    match receive.recv_timeout(FIRST_BYTES) {
        Ok(read) => read.map_err(fail),
        Err(_) => Err(format!("the first bytes of {} do not come within {FIRST_BYTES:?}", path.display())),
    }
}
