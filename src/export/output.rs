//! The file that an export writes: beside its place first, and there only when it is complete and durable.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::ExportError;

/// What happens to a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the export fails.
    Keep,
    /// The new file takes its place.
    Replace,
}

/// See the module. A file that is not finished is removed.
#[derive(Debug)]
pub struct Output {
    file: File,
    path: PathBuf,
    staged: PathBuf,
    existing: Existing,
    is_finished: bool,
}

impl Output {
    /// Makes the file beside `path`, with access for its owner alone: it has what a guest has on its disk.
    ///
    /// # Errors
    /// When there is another file at `path` that must stay, or no file can be made beside it.
    pub fn create(path: &Path, existing: Existing) -> Result<Self, ExportError> {
        check_place(path, existing)?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let staged = path.with_file_name(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&staged);
        let file = file.map_err(ExportError::writing("making a file beside it"))?;
        Ok(Self { file, path: path.to_owned(), staged, existing, is_finished: false })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// Errors of the storage; a file that took the name meanwhile and must stay.
    pub fn finish(mut self) -> Result<(), ExportError> {
        self.file.sync_all().map_err(ExportError::writing("making it durable"))?;
        check_place(&self.path, self.existing)?;
        fs::rename(&self.staged, &self.path).map_err(ExportError::writing("giving it its name"))?;
        self.is_finished = true;
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let dir = File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all());
        dir.map_err(ExportError::writing("making its name durable"))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.is_finished {
            let _ = fs::remove_file(&self.staged);
        }
    }
}

fn check_place(path: &Path, existing: Existing) -> Result<(), ExportError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ExportError::writing("looking for it")(error)),
        Ok(found) if !found.is_file() => {
            Err(ExportError::Unsuitable("it exists and is no regular file; name a file".into()))
        }
        Ok(_) if existing == Existing::Replace => Ok(()),
        Ok(_) => {
            let why = "it exists; give --force to replace it, or another name";
            Err(ExportError::Unsuitable(why.into()))
        }
    }
}
