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
var pushes = '8311e382-0749-4cb8-b61a-304f252e45ec' // AcrPush
var contributor = 'ba92f5b4-2d11-453d-a403-e96b0029c9fe' // Storage Blob Data Contributor
var roles = 'Microsoft.Authorization/roleDefinitions'

resource store 'Microsoft.Storage/storageAccounts@2023-05-01' = {
  name: '${prefix}${unique}'
  location: location
  kind: 'StorageV2'
  sku: { name: 'Standard_LRS' }
  properties: {
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    allowSharedKeyAccess: false
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

// For the environments of jobs. Behind a private network Azure ML cannot build them: push
// or import an image, see docs/azure-ml.md.
resource registry 'Microsoft.ContainerRegistry/registries@2023-07-01' = {
  name: '${prefix}${unique}'
  location: location
  sku: { name: private ? 'Premium' : 'Basic' }
  properties: {
    adminUserEnabled: false
    publicNetworkAccess: access
    networkRuleBypassOptions: 'AzureServices'
  }
}

resource workspace 'Microsoft.MachineLearningServices/workspaces@2024-10-01-preview' = {
  name: '${prefix}-workspace'
  location: location
  kind: 'Default'
  sku: { name: 'Basic', tier: 'Basic' }
  identity: { type: 'SystemAssigned' }
  properties: {
    storageAccount: store.id
    keyVault: vault.id
    containerRegistry: registry.id
    hbiWorkspace: true // less diagnostic data to Microsoft, encrypted scratch disks
    publicNetworkAccess: access
    v1LegacyMode: false
    systemDatastoresAuthMode: 'Identity' // no key of the workspace's store in any job
    provisionNetworkNow: private // else it is made with the first machine, which waits
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

// Who sends runs uploads code, and pushes images.
resource uploads 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(store.id, runner, contributor)
  scope: store
  properties: {
    principalId: runner
    principalType: runnerType
    roleDefinitionId: subscriptionResourceId(roles, contributor)
  }
}

resource pushesImages 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(registry.id, runner, pushes)
  scope: registry
  properties: {
    principalId: runner
    principalType: runnerType
    roleDefinitionId: subscriptionResourceId(roles, pushes)
  }
}

output id string = workspace.id
output name string = workspace.name
output principal string = workspace.identity.principalId
output store string = store.id
output storeName string = store.name
output registry string = registry.name
output registryId string = registry.id
output registryAddress string = registry.properties.loginServer
