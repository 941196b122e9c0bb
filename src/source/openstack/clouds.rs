//! `clouds.yaml`, the file in which OpenStack's clients have their clouds, and `secure.yaml`, which adds the secrets.

use std::fmt;

use reqwest::Url;
use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader, yaml::Hash};
use zeroize::Zeroizing;

/// One cloud: where its keystone is, and how to get a token there.
pub struct Cloud {
    /// The URL of token requests.
    pub tokens: Url,
    /// The body of a token request. It has the password or the secret.
    pub request: Zeroizing<String>,
    /// `region_name`.
    pub region: Option<String>,
    /// `interface`: public, internal or admin.
    pub interface: String,
    /// `image_endpoint_override`.
    pub image: Option<String>,
    /// `object_store_endpoint_override`.
    pub object_store: Option<String>,
}

impl fmt::Debug for Cloud {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Cloud").field("region", &self.region).finish_non_exhaustive()
    }
}

/// Finds a cloud. `secure` is the text of `secure.yaml`, whose keys go before those of `clouds`.
///
/// # Errors
/// What is wrong, without secrets.
pub fn find(clouds: &str, secure: Option<&str>, name: &str) -> Result<Cloud, String> {
    let mut all = section(clouds, "clouds.yaml")?.ok_or("clouds.yaml has no section clouds; add one")?;
    if let Some(secure) = secure
        && let Some(more) = section(secure, "secure.yaml")?
    {
        merge(&mut all, more);
    }
    match all.get(&Yaml::String(name.to_owned())) {
        Some(Yaml::Hash(cloud)) => Fields { cloud, name }.cloud(),
        Some(_) => Err(format!("cloud {name} of clouds.yaml is no map; correct it")),
        None => {
            let known: Vec<&str> = all.keys().filter_map(Yaml::as_str).collect();
            Err(format!("clouds.yaml has no cloud {name}; it has: {}", known.join(", ")))
        }
    }
}

/// The map `clouds` of a file.
fn section(text: &str, file: &str) -> Result<Option<Hash>, String> {
    // The parser's message may quote the line, which may have a password. Only its place is shown.
    let documents = YamlLoader::load_from_str(text)
        .map_err(|error| format!("{file} is not YAML at line {}; correct it", error.marker().line()))?;
    match documents.into_iter().next() {
        Some(Yaml::Hash(mut all)) => match all.remove(&Yaml::String("clouds".into())) {
            Some(Yaml::Hash(clouds)) => Ok(Some(clouds)),
            None => Ok(None),
            Some(_) => Err(format!("clouds of {file} is no map; correct it")),
        },
        None => Ok(None),
        Some(_) => Err(format!("{file} is no map; correct it")),
    }
}

fn merge(into: &mut Hash, from: Hash) {
    for (key, value) in from {
        match value {
            Yaml::Hash(new) if matches!(into.get(&key), Some(Yaml::Hash(_))) => {
                if let Some(Yaml::Hash(old)) = into.get_mut(&key) {
                    merge(old, new);
                }
            }
            value => _ = into.insert(key, value),
        }
    }
}

struct Fields<'a> {
    cloud: &'a Hash,
    name: &'a str,
}

impl Fields<'_> {
    fn wrong<T>(&self, why: impl fmt::Display) -> Result<T, String> {
        Err(format!("cloud {} of clouds.yaml: {why}", self.name))
    }

    /// A text or a number of a map: a project that is named 2024 is a number in YAML.
    fn text_of(&self, map: &Hash, key: &str) -> Result<Option<String>, String> {
        match map.get(&Yaml::String(key.to_owned())) {
            None | Some(Yaml::Null) => Ok(None),
            Some(Yaml::String(text)) if text.is_empty() => Ok(None),
            Some(Yaml::String(text) | Yaml::Real(text)) => Ok(Some(text.clone())),
            Some(Yaml::Integer(number)) => Ok(Some(number.to_string())),
            Some(_) => self.wrong(format_args!("{key} is no text; put it in quotes")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<String>, String> {
        self.text_of(self.cloud, key)
    }

    fn auth(&self, key: &str) -> Result<Option<String>, String> {
        match self.cloud.get(&Yaml::String("auth".into())) {
            Some(Yaml::Hash(auth)) => self.text_of(auth, key),
            _ => self.wrong("it has no map auth; add one with auth_url"),
        }
    }

    fn cloud(&self) -> Result<Cloud, String> {
        if self.text("profile")?.is_some() {
            return self.wrong(
                "profile names settings that plyfs does not have; write auth_url and the others here",
            );
        }
        if matches!(self.cloud.get(&Yaml::String("verify".into())), Some(Yaml::Boolean(false))) {
            return self.wrong(
                "verify is false, which sends the password to any server; remove it, and name the issuer's \
                 certificate in [http] ca_file",
            );
        }
        let Some(url) = self.auth("auth_url")? else { return self.wrong("auth has no auth_url; add it") };
        let interface = self.text("interface")?.unwrap_or_else(|| "public".into());
        // Older files have `publicURL`.
        let interface = interface.strip_suffix("URL").unwrap_or(&interface).to_owned();
        if !["public", "internal", "admin"].contains(&&*interface) {
            return self.wrong("interface is none of public, internal and admin; give one of them");
        }
        Ok(Cloud {
            tokens: self.tokens(&url)?,
            request: self.request()?,
            region: self.text("region_name")?,
            interface,
            image: self.text("image_endpoint_override")?,
            object_store: self.text("object_store_endpoint_override")?,
        })
    }

    fn tokens(&self, url: &str) -> Result<Url, String> {
        let Ok(mut url) = Url::parse(url) else { return self.wrong("auth_url is not a URL; correct it") };
        if !matches!(url.scheme(), "http" | "https") || !url.username().is_empty() || url.query().is_some() {
            return self.wrong("auth_url is no plain http or https URL; give scheme, host, port and path");
        }
        let path = url.path().trim_end_matches('/').to_owned();
        if path.ends_with("/v2.0") {
            return self
                .wrong("auth_url is of version 2.0 of keystone's API, which has ended; give that of v3");
        }
        let version = if path.ends_with("/v3") { "" } else { "/v3" };
        url.set_path(&format!("{path}{version}/auth/tokens"));
        Ok(url)
    }

    fn request(&self) -> Result<Zeroizing<String>, String> {
        let kind = self.text("auth_type")?.unwrap_or_else(|| "password".into());
        let body = match &*kind {
            "password" | "v3password" => self.password()?,
            "v3applicationcredential" => self.application_credential()?,
            other => {
                let other: String = other.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
                return self.wrong(format_args!(
                    "auth_type is {other}; plyfs knows password and v3applicationcredential"
                ));
            }
        };
        Ok(Zeroizing::new(json!({ "auth": body }).to_string()))
    }

    /// `{"id": ...}`, or the name with its domain.
    fn named(&self, id: &str, name: &str, domain: &str) -> Result<Option<Value>, String> {
        if let Some(id) = self.auth(id)? {
            return Ok(Some(json!({ "id": id })));
        }
        let Some(named) = self.auth(name)? else { return Ok(None) };
        let domain = self.domain(domain)?;
        Ok(Some(json!({ "name": named, "domain": domain })))
    }

    fn domain(&self, key: &str) -> Result<Value, String> {
        if let Some(id) = self.auth(&format!("{key}_domain_id"))? {
            return Ok(json!({ "id": id }));
        }
        if let Some(name) = self.auth(&format!("{key}_domain_name"))? {
            return Ok(json!({ "name": name }));
        }
        let id = self.auth("default_domain_id")?.or(self.auth("default_domain")?);
        Ok(json!({ "id": id.unwrap_or_else(|| "default".into()) }))
    }

    fn password(&self) -> Result<Value, String> {
        let Some(mut user) = self.named("user_id", "username", "user")? else {
            return self.wrong("auth has neither username nor user_id; add one");
        };
        let Some(password) = self.auth("password")? else {
            return self.wrong("auth has no password; add it, or put it into secure.yaml");
        };
        user["password"] = password.into();
        let identity = json!({ "methods": ["password"], "password": { "user": user } });
        let project = self.named("project_id", "project_name", "project")?;
        let scope = match (project, self.auth("system_scope")?) {
            (Some(project), _) => json!({ "project": project }),
            (None, Some(_)) => json!({ "system": { "all": true } }),
            (None, None) => match (self.auth("domain_id")?, self.auth("domain_name")?) {
                (Some(id), _) => json!({ "domain": { "id": id } }),
                (None, Some(name)) => json!({ "domain": { "name": name } }),
                (None, None) => {
                    return self.wrong("auth names no project; add project_name or project_id");
                }
            },
        };
        Ok(json!({ "identity": identity, "scope": scope }))
    }

    fn application_credential(&self) -> Result<Value, String> {
        let Some(secret) = self.auth("application_credential_secret")? else {
            return self
                .wrong("auth has no application_credential_secret; add it, or put it into secure.yaml");
        };
        let credential = match self.auth("application_credential_id")? {
            Some(id) => json!({ "id": id, "secret": secret }),
            None => {
                let name = self.auth("application_credential_name")?;
                let user = self.named("user_id", "username", "user")?;
                let Some((name, user)) = name.zip(user) else {
                    return self.wrong(
                        "auth has no application_credential_id; add it, or application_credential_name with the user",
                    );
                };
                json!({ "name": name, "secret": secret, "user": user })
            }
        };
        // Keystone gives it the scope that it was made with.
        let methods = json!(["application_credential"]);
        Ok(json!({ "identity": { "methods": methods, "application_credential": credential } }))
    }
}
