//! The files and directories that a configuration names: a daemon that starts without one of them fails later, in the
//! middle of its work.
//!
//! What must hold: nothing here reads a secret.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::{Config, ConfigError, CredentialSource, S3Keys, invalid};

impl Config {
    /// Refuses a configuration that names a file or directory which is not there, or which this user may not open.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the key of the first one.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        if let Some(path) = &self.http.ca_file {
            readable("http.ca_file", path)?;
        }
        for dir in &self.security.base_dirs {
            const KEY: &str = "security.base_dirs";
            let meta = fs::metadata(dir).map_err(|e| missing(KEY, dir, &e.to_string()))?;
            if !meta.is_dir() && !meta.file_type().is_block_device() {
                return Err(missing(KEY, dir, "it is not a directory or block device"));
            }
        }
        for dir in &self.encryption.key_dirs {
            const KEY: &str = "encryption.key_dirs";
            let meta = fs::metadata(dir).map_err(|e| missing(KEY, dir, &e.to_string()))?;
            if !meta.is_dir() {
                return Err(missing(KEY, dir, "it is not a directory"));
            }
        }
        if let Some(program) = self.encryption.key_command.as_ref().and_then(|command| command.first()) {
            is_program("encryption.key_command", Path::new(program))?;
        }
        for credential in &self.http.credentials {
            const KEY: &str = "http.credentials";
            match credential.source() {
                Some(
                    CredentialSource::Bearer(path)
                    | CredentialSource::Basic(path)
                    | CredentialSource::Headers(path),
                ) => readable(KEY, path)?,
                Some(CredentialSource::Command([program, ..])) => is_program(KEY, Path::new(program))?,
                _ => {}
            }
        }
        for entry in &self.http.s3 {
            const KEY: &str = "http.s3";
            match entry.keys() {
                Some(S3Keys::File(path)) => readable(KEY, path)?,
                Some(S3Keys::Command([program, ..])) => is_program(KEY, Path::new(program))?,
                _ => {}
            }
        }
        for cloud in &self.http.clouds {
            readable("http.clouds", &cloud.file)?;
        }
        Ok(())
    }
}

fn readable(key: &'static str, path: &Path) -> Result<(), ConfigError> {
    let file = fs::metadata(path).map_err(|e| missing(key, path, &e.to_string()))?;
    if !file.is_file() {
        return Err(missing(key, path, "it is not a file"));
    }
    fs::File::open(path).map(drop).map_err(|e| missing(key, path, &e.to_string()))
}

fn is_program(key: &'static str, path: &Path) -> Result<(), ConfigError> {
    let meta = fs::metadata(path).map_err(|e| missing(key, path, &e.to_string()))?;
    if meta.is_file() { Ok(()) } else { Err(missing(key, path, "it is not a program")) }
}

fn missing(key: &'static str, path: &Path, why: &str) -> ConfigError {
    invalid(key, format!("{}: {why}; put it there, or correct the key", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::Overrides;
    use super::*;

    fn check(text: &str) -> Result<(), ConfigError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("plyfs.toml");
        fs::write(&path, text).expect("write the file");
        Config::load(Some(&path), Overrides::default()).expect("valid as a text").check_files()
    }

    #[test]
    fn a_file_that_is_named_and_not_there_is_refused_by_name() {
        for (text, parts) in [
            ("[http]\nca_file = \"/nonexistent.pem\"\n", ["http.ca_file", "/nonexistent.pem"]),
            ("[http]\nca_file = \"/usr\"\n", ["http.ca_file", "/usr: it is not a file"]),
            (
                "[security]\nbase_dirs = [\"/usr\", \"/nonexistent\"]\n",
                ["security.base_dirs", "/nonexistent: "],
            ),
            (
                "[security]\nbase_dirs = [\"/etc/passwd\"]\n",
                ["security.base_dirs", "is not a directory or block device"],
            ),
            (
                "[[http.credentials]]\nurl = \"https://example.org/\"\nbearer_file = \"/nonexistent\"\n",
                ["http.credentials", "/nonexistent: "],
            ),
            (
                "[[http.credentials]]\nurl = \"https://example.org/\"\ncommand = [\"/nonexistent\", \"-q\"]\n",
                ["http.credentials", "/nonexistent: "],
            ),
            ("[[http.clouds]]\nname = \"a\"\nfile = \"/nonexistent\"\n", ["http.clouds", "/nonexistent: "]),
        ] {
            let said = check(text).expect_err(text).to_string();
            assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        }
        check("[security]\nbase_dirs = [\"/usr\"]\n[http]\nca_file = \"/etc/passwd\"\n")
            .expect("all is there");
    }
}
