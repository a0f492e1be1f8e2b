// The workspace, and what belongs to it: a store for code and logs, a key vault. No
// patient data. No Application Insights.
param prefix string
param location string
param runner string
param runnerType string
param private bool

var unique = uniqueString(resourceGroup().id)
var access = private ? 'Disabled' : 'Enabled'
var dataScientist = 'f6c7c914-8db3-469d-8ca1-694a8f32e121' // AzureML Data Scientist
var roles = 'Microsoft.Authorization/roleDefinitions'

resource store 'Microsoft.Storage/storageAccounts@2023-05-01' = {
  name: '${prefix}${unique}'
  location: location
  kind: 'StorageV2'
  sku: { name: 'Standard_LRS' }
  properties: {
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    allowBlobPublicAccess: false
    publicNetworkAccess: access
    networkAcls: {
      bypass: 'AzureServices'
      defaultAction: private ? 'Deny' : 'Allow'
    }
  }
}

resource vault 'Microsoft.KeyVault/vaults@2023-07-01' = {
  name: '${prefix}${take(unique, 12)}'
  location: location
  properties: {
    tenantId: subscription().tenantId
    sku: { family: 'A', name: 'standard' }
    accessPolicies: []
    enableSoftDelete: true
    publicNetworkAccess: access
    networkAcls: {
      bypass: 'AzureServices'
      defaultAction: private ? 'Deny' : 'Allow'
    }
  }
}

// Without one, Azure ML makes a registry when it first builds an environment. It cannot
// build behind a private network: push the image, see docs/azure-ml.md.
resource registry 'Microsoft.ContainerRegistry/registries@2023-07-01' = if (private) {
  name: '${prefix}${unique}'
  location: location
  sku: { name: 'Premium' }
  properties: {
    adminUserEnabled: false
    publicNetworkAccess: 'Disabled'
    networkRuleBypassOptions: 'AzureServices'
  }
}

resource workspace 'Microsoft.MachineLearningServices/workspaces@2024-10-01' = {
  name: '${prefix}-workspace'
  location: location
  kind: 'Default'
  sku: { name: 'Basic', tier: 'Basic' }
  identity: { type: 'SystemAssigned' }
  properties: {
    storageAccount: store.id
    keyVault: vault.id
    containerRegistry: private ? registry.id : null
    hbiWorkspace: true // less diagnostic data to Microsoft, encrypted scratch disks
    publicNetworkAccess: access
    v1LegacyMode: false
    managedNetwork: {
      isolationMode: private ? 'AllowOnlyApprovedOutbound' : 'Disabled'
    }
  }
}

resource sendsRuns 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(workspace.id, runner, dataScientist)
  scope: workspace
  properties: {
    principalId: runner
    principalType: runnerType
    roleDefinitionId: subscriptionResourceId(roles, dataScientist)
  }
}

output id string = workspace.id
output name string = workspace.name
output principal string = workspace.identity.principalId
output store string = store.id
output registry string = private ? registry.name : ''
