//! Where the configuration file is, for the daemon and for every command alike.
//!
//! What must hold: a file describes one store. A store that the caller names is never served with the file of another
//! store, whose mount point it would take.

use std::path::{Path, PathBuf};

use super::{Config, ConfigError, Overrides, host, parse_error};

/// The file of the host. Root reads it; for other users there is none.
pub const SYSTEM_FILE: &str = "/etc/plyfs/plyfs.toml";

/// Where the file is: the one that is `named`, else the host's, when root runs this, the file exists, and `store` is
/// either not named or the store of that file.
///
/// # Errors
/// When the host's file cannot be read, or the store cannot be told.
pub fn file(named: Option<&Path>, store: Option<&Path>) -> Result<Option<PathBuf>, ConfigError> {
    match named {
        Some(path) => Ok(Some(path.to_path_buf())),
        None if host::is_root() => file_of_host(Path::new(SYSTEM_FILE), store),
        None => Ok(None),
    }
}

pub(super) fn file_of_host(path: &Path, store: Option<&Path>) -> Result<Option<PathBuf>, ConfigError> {
    if !path.exists() {
        return Ok(None);
    }
    let Some(store) = store else { return Ok(Some(path.to_path_buf())) };
    let of_file = match store_of(path)? {
        Some(store) => store,
        None => host::default_store()?,
    };
    let named = std::path::absolute(store)
        .map_err(|source| ConfigError::Relative { path: store.to_path_buf(), source })?;
    // With and without a slash at the end, and through `.`, it is the same path.
    let same = named.components().eq(of_file.components());
    Ok(same.then(|| path.to_path_buf()))
}

/// The store that a command works on: the one that is `named`, else that of the configuration file, else the default.
///
/// Of the file, only this key is looked at: a command reaches a running daemon although another key is wrong by now.
///
/// # Errors
/// When there is a file that cannot be read, or no default.
pub fn store(config: Option<&Path>, named: Option<&Path>) -> Result<PathBuf, ConfigError> {
    if let Some(store) = named {
        let absolute = std::path::absolute(store);
        return absolute.map_err(|source| ConfigError::Relative { path: store.to_path_buf(), source });
    }
    let of_file = match file(config, None)? {
        Some(path) => store_of(&path)?,
        None => None,
    };
    of_file.map_or_else(host::default_store, Ok)
}

fn store_of(path: &Path) -> Result<Option<PathBuf>, ConfigError> {
    let text = read(path)?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| parse_error(path, &text, &error))?;
    let store = table.get("store").and_then(|store| store.get("path")).and_then(toml::Value::as_str);
    match store.map(PathBuf::from) {
        // The daemon refuses it, and its message says all.
        Some(store) if !store.is_absolute() => {
            Config::load(Some(path), Overrides::default()).map(|config| Some(config.store))
        }
        store => Ok(store),
    }
}

pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("plyfs.toml");
        std::fs::write(&path, text).expect("write the file");
        (dir, path)
    }

    #[test]
    fn the_file_of_the_host_is_for_its_own_store_only() {
        let (_dir, path) = host_file("[store]\npath = \"/srv/vm\"\n[mount]\npath = \"/mnt/vm\"\n");
        let of = |store: Option<&str>| file_of_host(&path, store.map(Path::new)).expect("a valid file");
        assert_eq!(of(None), Some(path.clone()));
        assert_eq!(of(Some("/srv/vm/")), Some(path.clone()));
        assert_eq!(of(Some("/srv/other")), None);
        assert_eq!(file_of_host(Path::new("/nonexistent.toml"), None).expect("no file"), None);
    }

    #[test]
    fn a_command_finds_the_store_although_another_key_is_wrong() {
        let (_dir, path) = host_file("[store]\npath = \"/srv/vm\"\n[cahce]\n");
        assert_eq!(store(Some(&path), None).expect("the store"), Path::new("/srv/vm"));
        assert_eq!(store(Some(&path), Some(Path::new("/other"))).expect("the store"), Path::new("/other"));
        assert!(Config::load(Some(&path), Overrides::default()).is_err());
        let (_dir, path) = host_file("[store\n");
        let said = store(Some(&path), None).expect_err("no TOML").to_string();
        assert!(said.contains("line 1"), "{said}");
        let (_dir, path) = host_file("[store]\npath = \"vm\"\n");
        let said = store(Some(&path), None).expect_err("a relative path").to_string();
        assert!(said.contains("store.path") && said.contains("absolute"), "{said}");
    }
}
